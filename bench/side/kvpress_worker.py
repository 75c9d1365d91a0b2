"""Compresses one text with kvpress, once a line on stdin; runs in an environment of its own (see kvpress.py).

Arguments: model folder, file with the token ids as JSON, keep ratio, threads.  Each answer is a line of JSON.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from kvpress import KVzipPress
from transformers import AutoModelForCausalLM, DynamicCache


@torch.inference_mode()
def run(model, ids, keep_ratio):
    """Seconds of kvpress' prefill, and of all."""
    started = time.perf_counter()
    with KVzipPress(compression_ratio=1 - keep_ratio)(model):
        model.model(input_ids=ids, past_key_values=DynamicCache())
        prefilled = time.perf_counter()
    return {"prefill_s": prefilled - started, "total_s": time.perf_counter() - started}


def main():
    folder, ids_file, keep_ratio, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    ids = torch.tensor([json.loads(Path(ids_file).read_text())])
    run(model, ids[:, :256], float(keep_ratio))  # first use of weights and libraries
    print(json.dumps({name: version(name) for name in ("kvpress", "torch", "transformers")}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(run(model, ids, float(keep_ratio))), flush=True)


if __name__ == "__main__":
    main()
