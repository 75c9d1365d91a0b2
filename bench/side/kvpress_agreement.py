"""Scores and kept pairs of several presses of kvpress; runs in an environment of its own (see agreement.py).

Argument: a folder with `job.json`. Writes `<name>.safetensors` there for each press of the job, and `versions.json`.
"""

import json
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path

import kvpress
import torch
from kvpress.presses.base_press import BasePress
from kvpress_parity import RecordingPress
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DynamicCache


class NotingPress(BasePress):
    """Notes what a press scores, and keeps at several ratios; the cache stays whole."""

    def __init__(self, press, keep_ratios):
        self.press, self.keep_ratios, self.layers = press, keep_ratios, []

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        scorer = getattr(self.press, "press", self.press)
        seen = (module, hidden_states, keys, values, attentions, kwargs)
        score = partial(type(scorer).score, scorer, *seen)
        scorer.score = lambda *args: score()  # of the true values, while `compress` gathers positions in their place
        positions = torch.arange(keys.shape[2], dtype=values.dtype).reshape(1, 1, -1, 1).expand_as(values)
        found = {"scores": score()[0].clone()}
        for keep in self.keep_ratios:
            self.press.compression_ratio = 1 - keep
            _, gathered = self.press.compress(module, hidden_states, keys, positions, attentions, kwargs)
            found[f"kept_{keep}"] = self._mask(module, gathered[0, :, :, 0].long(), keys.shape[2])
        self.layers.append(found)
        return keys, values

    def _mask(self, module, positions, length):
        mask = torch.zeros(positions.shape[0], length, dtype=torch.bool).scatter_(1, positions, True)
        if isinstance(self.press, kvpress.AdaKVPress):
            _, heads, evicted = module.masked_key_indices
            mask[heads, evicted] = False
        return mask

    @property
    def found(self):
        return {name: torch.stack([layer[name] for layer in self.layers]) for name in self.layers[0]}


def press_of(wanted, keep_ratios):
    """wanted: name, options, and whether AdaKVPress is around it."""
    if wanted["press"] == "KVzipPress":
        press = RecordingPress(compression_ratio=0.5, **wanted["options"])
        press.ratios = {keep: 1 - keep for keep in keep_ratios}
        return press
    press = getattr(kvpress, wanted["press"])(compression_ratio=0.5, **wanted["options"])
    return NotingPress(kvpress.AdaKVPress(press) if wanted["adakv"] else press, keep_ratios)


@torch.inference_mode()
def main():
    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text())
    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, attn_implementation="sdpa").eval()
    for name, wanted in job["presses"].items():
        model.set_attn_implementation("eager" if wanted["press"] == "ObservedAttentionPress" else "sdpa")
        press = press_of(wanted, job["keep_ratios"])
        with press(model):
            model.model(input_ids=torch.tensor([job["ids"]]), past_key_values=DynamicCache())
        save_file(press.found, folder / f"{name}.safetensors")
    versions = {name: version(name) for name in ("kvpress", "torch", "transformers")}
    (folder / "versions.json").write_text(json.dumps(versions))


if __name__ == "__main__":
    main()
