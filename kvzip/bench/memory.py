"""Peak memory of reading and of compressing, and what is held afterwards."""

from __future__ import annotations

from typing import Any

import torch

from kvzip.bench.baseline import plain_prefill
from kvzip.bench.measure import WARMUP_LEN, paired, peak_over, ratios, report
from kvzip.bench.texts import bench_text
from kvzip.compressed import CompressedContext
from kvzip.llm import LLM
from kvzip.memory import release_freed, rss_nbytes


def bench_memory(
    llm: LLM, context_len: int, keep_ratio: float, num_runs: int = 3, text_path: str | None = None
) -> dict[str, Any]:
    """Resident memory above the loaded model: peaks of a prefill by transformers in one pass, of our prefill in blocks
    and of compressing; and what stays when a compressed context is all that is kept.
    """
    text = bench_text(llm, context_len, text_path)
    ids = torch.cat([torch.tensor(llm.prefix_ids(), dtype=torch.int64), llm.tokenize(text)])
    plain_prefill(llm, ids[:WARMUP_LEN])
    base = rss_nbytes()
    held: list[float] = []
    last: list[CompressedContext] = []

    def compress() -> float:
        last.clear()
        peak, context = peak_over(base, lambda: llm.compress(text, keep_ratio, certify=False))
        last.append(context)
        release_freed()
        held.append(max(0, rss_nbytes() - base))
        return peak

    works = {
        "plain_peak_nbytes": lambda: float(peak_over(base, lambda: plain_prefill(llm, ids))[0]),
        "prefill_peak_nbytes": lambda: float(peak_over(base, lambda: llm.prefill(text))[0]),
        "compress_peak_nbytes": compress,
    }
    samples = paired(num_runs, works, warmup=0)
    figures = {
        **samples,
        "held_nbytes": held,
        "compress_over_plain": ratios(samples["compress_peak_nbytes"], samples["plain_peak_nbytes"]),
        "compress_over_prefill": ratios(samples["compress_peak_nbytes"], samples["prefill_peak_nbytes"]),
    }
    data = last[0].data
    sizes = {"kv_nbytes": data.kv_nbytes, "full_kv_nbytes": data.info.full_kv_nbytes}
    return report("memory", llm, data.context_len, keep_ratio, text_path, figures, **sizes)
