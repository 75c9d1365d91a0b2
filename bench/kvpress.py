"""kvpress' KVzipPress against kvzip: same model, same tokens, one run, in alternation.

    .venv/bin/python bench/kvpress.py -m smollm2-135m --context-len 2000 --json bench/results/kvpress.json

kvpress wants another transformers than kvzip, so it gets an environment of its own, .venv-kvpress, made at first use.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import kvzip
from kvzip.bench.baseline import plain_prefill
from kvzip.bench.measure import WARMUP_LEN, paired, ratios, report, timed, write_result
from kvzip.bench.texts import bench_text
from kvzip.models.cache import model_folder

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = ROOT / ".venv-kvpress"
WORKER = ROOT / "bench" / "side" / "kvpress_worker.py"  # in a folder of its own: this file would hide its `kvpress`
PACKAGES = ("kvpress==0.5.5", f"torch=={version('torch').split('+')[0]}")


def environment() -> Path:
    """The Python of kvpress' environment."""
    python = ENVIRONMENT / "bin" / "python"
    if not (ENVIRONMENT / ".installed").exists():
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
        pip_args = os.environ.get("PIP_ARGS", "").split()
        subprocess.run([python, "-m", "pip", "install", "--quiet", *pip_args, *PACKAGES], check=True)
        (ENVIRONMENT / ".installed").touch()
    return python


@contextmanager
def worker(folder: Path, ids: list[int], keep_ratio: float, threads: int) -> Iterator[subprocess.Popen[str]]:
    """A process that compresses once for each line it is sent."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(ids, file)
        file.flush()
        command = [environment(), WORKER, folder, file.name, keep_ratio, threads]
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            yield process
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(timeout=60)


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"kvpress ended with status {process.wait()}: run {WORKER} by hand to see why")
    found: dict[str, Any] = json.loads(line)
    return found


def compare(
    llm: kvzip.LLM, text: str, keep_ratio: float, num_runs: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Figures, and the versions of the other environment."""
    ids = torch.cat([torch.tensor(llm.prefix_ids(), dtype=torch.int64), llm.tokenize(text)])
    seen: dict[str, list[float]] = {"kvzip_prefill_s": [], "kvpress_prefill_s": []}

    def ours() -> float:
        seconds, context = timed(lambda: llm.compress(text, keep_ratio, certify=False))
        seen["kvzip_prefill_s"].append(context.data.info.prefill_s)
        return seconds

    def theirs() -> float:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        found = answer(process)
        seen["kvpress_prefill_s"].append(found["prefill_s"])
        return float(found["total_s"])

    plain_prefill(llm, ids[:WARMUP_LEN])
    with worker(model_folder(llm.name), ids.tolist(), keep_ratio, torch.get_num_threads()) as process:
        versions = answer(process)
        works = {
            "plain_prefill_s": lambda: timed(lambda: plain_prefill(llm, ids))[0],
            "kvpress_s": theirs,
            "kvzip_s": ours,
        }
        samples = paired(num_runs, works, warmup=0) | seen
    extra = {
        name: [total - read for total, read in zip(samples[f"{name}_s"], samples[f"{name}_prefill_s"], strict=True)]
        for name in ("kvpress", "kvzip")
    }
    figures = {
        **samples,
        "kvpress_over_prefill": ratios(extra["kvpress"], samples["plain_prefill_s"]),
        "kvzip_over_prefill": ratios(extra["kvzip"], samples["plain_prefill_s"]),
        "kvpress_over_kvzip": ratios(extra["kvpress"], extra["kvzip"]),
    }
    return figures, versions


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-m", "--model", required=True, help="a name of `kvzip models`")
    parser.add_argument("--context-len", type=int, default=2000)
    parser.add_argument("--keep-ratio", type=float, default=0.3)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--text", help="a text, or SQuAD JSON; default: the bundled text")
    parser.add_argument("--json", required=True, help="the result file to write")
    args = parser.parse_args()
    llm = kvzip.load(args.model, dtype="float32")
    text = bench_text(llm, args.context_len, args.text)
    figures, versions = compare(llm, text, args.keep_ratio, args.runs)
    write_result(
        report("kvpress", llm, len(llm.tokenize(text)), args.keep_ratio, args.text, figures, other=versions), args.json
    )


if __name__ == "__main__":
    main()
