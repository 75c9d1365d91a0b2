"""What compressing costs over reading alone: seconds and memory."""

from __future__ import annotations

from typing import Any

import torch

from kvzip.bench.baseline import plain_prefill
from kvzip.bench.measure import WARMUP_LEN, paired, peak_over, ratios, report, timed
from kvzip.bench.texts import bench_text
from kvzip.compressed import CompressedContext
from kvzip.llm import LLM
from kvzip.memory import rss_nbytes


def bench_compress(
    llm: LLM,
    context_len: int,
    keep_ratio: float,
    num_runs: int = 3,
    text_path: str | None = None,
    replay_scope: str = "auto",
) -> dict[str, Any]:
    """Compression against a plain prefill of the same tokens by transformers, in alternation.

    Returns settings, provenance and, as median and spread: seconds of the plain prefill, of ours, of scoring and of
    all; `score_over_prefill` = (all - our prefill) / plain prefill; peak memory of each above the loaded model;
    bytes of the kept pairs against the full cache.
    """
    text = bench_text(llm, context_len, text_path)
    seen: dict[str, list[float]] = {"prefill_s": [], "score_s": [], "peak_nbytes": [], "plain_peak_nbytes": []}
    last: list[Any] = []
    base = rss_nbytes()

    def compress() -> tuple[float, CompressedContext]:
        options: dict[str, Any] = {"replay_scope": replay_scope, "certify": False}
        return timed(lambda: llm.compress(text, keep_ratio, **options), llm.model.device)

    def plain() -> float:
        peak, (seconds, _) = peak_over(
            base, lambda: timed(lambda: plain_prefill(llm, _ids(llm, text)), llm.model.device)
        )
        seen["plain_peak_nbytes"].append(peak)
        return seconds

    def ours() -> float:
        last.clear()
        peak, (seconds, context) = peak_over(base, compress)
        info = context.data.info
        for name, value in (("prefill_s", info.prefill_s), ("score_s", info.score_s), ("peak_nbytes", peak)):
            seen[name].append(value)
        last.append(context)
        return seconds

    plain_prefill(llm, _ids(llm, text)[:WARMUP_LEN])
    samples = paired(num_runs, {"plain_prefill_s": plain, "compress_s": ours}, warmup=0)
    extra = [c - p for c, p in zip(samples["compress_s"], seen["prefill_s"], strict=True)]
    figures = {
        **samples,
        **seen,
        "score_over_prefill": ratios(extra, samples["plain_prefill_s"]),
        "compress_over_prefill": ratios(samples["compress_s"], samples["plain_prefill_s"]),
        "peak_over_prefill_peak": ratios(seen["peak_nbytes"], seen["plain_peak_nbytes"]),
    }
    context = last[0]
    info = context.data.info
    sizes = {"kv_nbytes": context.data.kv_nbytes, "full_kv_nbytes": info.full_kv_nbytes, "method": info.method}
    return report("compress", llm, context.data.context_len, keep_ratio, text_path, figures, **sizes)


def _ids(llm: LLM, text: str) -> torch.Tensor:
    return torch.cat([torch.tensor(llm.prefix_ids(), dtype=torch.int64), llm.tokenize(text)])
