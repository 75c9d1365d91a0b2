"""The first token from a reopened file against reading the text again."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from kvzip.bench.baseline import plain_first_token
from kvzip.bench.measure import WARMUP_LEN, paired, ratios, report, timed
from kvzip.bench.texts import bench_text
from kvzip.llm import LLM

QUESTION = "What is this text about?"


def bench_open(
    llm: LLM, context_len: int, keep_ratio: float, num_runs: int = 3, text_path: str | None = None
) -> dict[str, Any]:
    """Open a file (hash checked, pages cached by the system) and answer one token, against prefill + one token.

    The model is loaded already in both. Returns settings, provenance, and the median and spread of the seconds of each
    and of their ratio `prefill_over_open`.
    """
    text = bench_text(llm, context_len, text_path)
    context = llm.compress(text, keep_ratio, certify=False)
    everything = torch.cat([context.data.prefix_ids, context.data.context_ids]).long()
    ids = torch.cat([everything, torch.tensor(llm.question_ids(QUESTION))])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "context.kvz"
        nbytes = context.save(path)
        works = {
            "prefill_first_token_s": lambda: timed(lambda: plain_first_token(llm, ids), llm.model.device)[0],
            "open_first_token_s": lambda: timed(
                lambda: llm.open(path).ask(QUESTION, max_new_tokens=1), llm.model.device
            )[0],
        }
        plain_first_token(llm, ids[-WARMUP_LEN:])
        llm.open(path).ask(QUESTION, max_new_tokens=1)
        samples = paired(num_runs, works, warmup=0)
    figures = {
        **samples,
        "prefill_over_open": ratios(samples["prefill_first_token_s"], samples["open_first_token_s"]),
    }
    return report("open", llm, context.data.context_len, keep_ratio, text_path, figures, file_nbytes=nbytes)
