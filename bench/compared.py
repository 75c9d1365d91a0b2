"""What parity.py and agreement.py share: asking kvpress, and how near what it found is to ours."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from kvpress import ROOT, environment  # bench/kvpress.py
from torch import Tensor

import kvzip
from kvzip.chunks import chunk_slices
from kvzip.compress import FullContext
from kvzip.models.cache import model_folder

SIDE = ROOT / "bench" / "side"
KEEP_RATIOS = (0.5, 0.1, 0.3)  # the last is that of parity's answers
KVPRESS_CHUNK_LEN = 2048


@contextmanager
def ask(llm: kvzip.LLM, worker: Path, job: dict[str, Any]) -> Iterator[Path]:
    """The folder in which `worker`, run in kvpress' environment, has left what it found."""
    common = {"model": str(model_folder(llm.name)), "threads": torch.get_num_threads(), "keep_ratios": KEEP_RATIOS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "job.json").write_text(json.dumps(common | job))
        subprocess.run([environment(), worker, folder], check=True)
        yield folder


def check_repeats(context: FullContext, theirs: Tensor, chunk_len: int) -> None:
    """That kvpress lets the model repeat the same tokens after the same prompts; else nothing can be compared."""
    chunks = chunk_slices(context.context_ids.numel(), chunk_len, merge_short=False)
    ours = torch.cat([ids for _, ids in context._replays(chunks)])
    if not torch.equal(ours, theirs):
        raise SystemExit("kvpress replays other tokens than kvzip does: the prompts of the two differ")


def spearman(first: Tensor, second: Tensor) -> float:
    """Rank correlation of two vectors, ties at their mean rank; 0 where one is constant."""
    ranks = torch.stack([mean_ranks(first), mean_ranks(second)])
    return float(torch.corrcoef(ranks)[0, 1].nan_to_num(0.0))


def mean_ranks(values: Tensor) -> Tensor:
    """Ranks from 1, equal values with the mean of theirs."""
    _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[place]


def overlap(first: Tensor, second: Tensor) -> float:
    """Share of pairs that both masks keep, of the mean number that they keep; 1 where neither keeps any."""
    kept = int(first.sum() + second.sum())
    return float(2 * (first & second).sum() / kept) if kept else 1.0
