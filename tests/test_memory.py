"""Evicted memory is really gone."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

CODE = """
import gc, json, sys, kvzip
from kvzip.memory import rss_nbytes
name, options, text = sys.argv[1], json.loads(sys.argv[2]), sys.stdin.read()
llm = kvzip.load(name)
llm.compress(text[:4000], **options).ask("What is this?", max_new_tokens=2)  # what the libraries allocate once
gc.collect()
before = rss_nbytes()
context = llm.compress(text, **options)
gc.collect()
print(json.dumps({"grown": rss_nbytes() - before, **context.stats}))
"""


def stats_of(text: str, **options: object) -> dict:
    """What a fresh process holds more after compressing `text` than before, beside the context's own numbers."""
    run = subprocess.run(
        [sys.executable, "-c", CODE, "smollm2-135m", json.dumps(options)],
        input=text, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found: dict = json.loads(run.stdout.strip().splitlines()[-1])
    return found


SPARE = 48 * 2**20  # what else a process picks up on the way


@pytest.mark.real
def test_resident_memory_falls_with_the_keep_ratio_after_six_thousand_tokens(articles: list[dict]) -> None:
    stats = stats_of("\n\n".join(a["text"] for a in articles)[:28_000], keep_ratio=0.3)
    assert stats["context_len"] > 5500
    wanted = 0.3 * stats["full_kv_nbytes"]
    assert abs(stats["kv_nbytes"] / wanted - 1) < 0.02
    assert stats["grown"] < wanted + SPARE < 0.6 * stats["full_kv_nbytes"]


@pytest.mark.real
def test_resident_memory_falls_with_the_bits_of_a_number(articles: list[dict]) -> None:
    """All pairs in four bits, scales counted: at most 0.30 of float16, which is half of this dtype."""
    stats = stats_of("\n\n".join(a["text"] for a in articles)[:16_000], method="int4")
    assert stats["keep_ratio"] == 1 and stats["context_len"] > 3000
    assert stats["kv_nbytes"] < 0.15 * stats["full_kv_nbytes"]
    assert stats["grown"] < 0.15 * stats["full_kv_nbytes"] + SPARE < 0.6 * stats["full_kv_nbytes"]
