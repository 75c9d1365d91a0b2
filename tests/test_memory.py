"""Evicted memory is really gone."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

CODE = """
import gc, json, sys, kvzip
from kvzip.memory import rss_nbytes
name, keep_ratio, text = sys.argv[1], float(sys.argv[2]), sys.stdin.read()
llm = kvzip.load(name)
llm.compress(text[:4000], 0.5).ask("What is this?", max_new_tokens=2)  # what the libraries allocate once
gc.collect()
before = rss_nbytes()
context = llm.compress(text, keep_ratio)
gc.collect()
print(json.dumps({"grown": rss_nbytes() - before, **context.stats}))
"""


@pytest.mark.real
def test_resident_memory_falls_with_the_keep_ratio_after_six_thousand_tokens(articles: list[dict]) -> None:
    text = "\n\n".join(a["text"] for a in articles)[:28_000]
    run = subprocess.run(
        [sys.executable, "-c", CODE, "smollm2-135m", "0.3"], input=text, capture_output=True, text=True, check=True
    )
    stats = json.loads(run.stdout.strip().splitlines()[-1])
    assert stats["context_len"] > 5500
    wanted = 0.3 * stats["full_kv_nbytes"]
    assert abs(stats["kv_nbytes"] / wanted - 1) < 0.02
    spare = 48 * 2**20  # what else a process picks up on the way
    assert stats["grown"] < wanted + spare < 0.6 * stats["full_kv_nbytes"]
