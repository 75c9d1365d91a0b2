"""Scores, kept pairs and answers of kvpress; runs in an environment of its own (see parity.py).

Argument: a folder with `job.json`. Writes `<context>-<kind>.safetensors` and `answers.json` there. Kinds: "own" is
kvpress as it is, "matched" has the whole prefix as its sinks and keeps as many pairs of the context as kvzip.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from kvpress import KVPressTextGenerationPipeline, KVzipPress
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar


class RecordingPress(KVzipPress):
    """KVzipPress that notes what it did, at several compression ratios; the last one stays in force."""

    def prepare(self, *args, **kwargs):
        chunks = super().prepare(*args, **kwargs)
        self.found = {"repeat_ids": torch.cat([ids[0] for _, ids in chunks])}
        return chunks

    def compress_post(self, model):
        self.found["scores"] = self.score_val[:, 0].clone()  # before the sinks get the highest score
        for name, ratio in self.ratios.items():
            self.compression_ratio = ratio
            super().compress_post(model)
            kept = torch.ones_like(self.found["scores"], dtype=torch.bool)
            for layer in model.model.layers:
                _, heads, positions = layer.self_attn.masked_key_indices
                kept[layer.self_attn.layer_idx, heads, positions] = False
            self.found[f"kept_{name}"] = kept


def compression_ratios(keep_ratios, kind, num_heads, length, prefix_len):
    """What kvpress is to be asked for, by keep ratio."""
    if kind == "own":
        return {keep: 1 - keep for keep in keep_ratios}
    pairs = num_heads * (length - prefix_len)
    evicted = {keep: pairs - max(1, round(keep * pairs)) for keep in keep_ratios}
    return {keep: (count + 0.5) / (num_heads * length) for keep, count in evicted.items()}  # kvpress rounds down


def press_of(kind, context, job, config):
    num_heads = config.num_hidden_layers * config.num_key_value_heads
    sinks = {} if kind == "own" else {"n_sink": context["prefix_len"]}
    press = RecordingPress(compression_ratio=0.5, chunk_size=job["chunk_len"], **sinks)
    press.ratios = compression_ratios(job["keep_ratios"], kind, num_heads, len(context["ids"]), context["prefix_len"])
    return press


@torch.inference_mode()
def main():
    disable_progress_bar()
    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text())
    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, attn_implementation="sdpa").eval()
    pipeline = KVPressTextGenerationPipeline(model=model, tokenizer=AutoTokenizer.from_pretrained(job["model"]))
    answers = []
    for index, context in enumerate(job["contexts"]):
        ids = {
            "context_ids": torch.tensor([context["ids"]]),
            "questions_ids": [torch.tensor([question]) for question in context["questions"]],
        }
        given = {"kvpress_full": pipeline._forward(ids, job["max_new_tokens"])}
        for kind in ("own", "matched"):
            press = press_of(kind, context, job, model.config)
            given[f"kvpress_{kind}"] = pipeline._forward(ids, job["max_new_tokens"], press)
            save_file(press.found, folder / f"{index}-{kind}.safetensors")
        answers.append(given)
    versions = {name: version(name) for name in ("kvpress", "torch", "transformers")}
    (folder / "answers.json").write_text(json.dumps({"versions": versions, "answers": answers}))


if __name__ == "__main__":
    main()
