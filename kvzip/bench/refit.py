"""What mending what stays costs: refitting over the replay whose queries it uses."""

from __future__ import annotations

from typing import Any

from kvzip.bench.measure import paired, ratios, report, timed
from kvzip.bench.texts import bench_text
from kvzip.llm import LLM
from kvzip.methods import parse_method
from kvzip.options import CompressOptions

METHOD = "kvzip+floored"


def bench_refit(
    llm: LLM, context_len: int, keep_ratio: float, num_runs: int = 3, text_path: str | None = None
) -> dict[str, Any]:
    """A replay, packing alone, with `refit`, with `refit` into codes, and with pursued keys, on one prefill, in turn.

    Figures: seconds of each; `refit_over_replay` = (packing with refit - packing alone) / replay.
    """
    full = llm.prefill(bench_text(llm, context_len, text_path))

    method = parse_method(METHOD)

    def pack(name: str) -> float:
        options = CompressOptions(keep_ratio=keep_ratio, method=name, certify=False)
        return timed(lambda: full.compress(options), llm.model.device)[0]

    def replay() -> float:
        full._scores.clear()  # or there would be nothing to do
        return timed(lambda: full.scores(method), llm.model.device)[0]

    replay()
    pack(f"{METHOD}+refit")  # from here on the queries are there
    works = {
        "replay_s": replay,
        "pack_s": lambda: pack(METHOD),
        "refit_s": lambda: pack(f"{METHOD}+refit"),
        "coded_s": lambda: pack(f"{METHOD}+refit+int4"),
        "pursued_s": lambda: pack(f"{METHOD}+refit:keys=pursued"),
    }
    samples = paired(num_runs, works, warmup=0)

    def over_replay(name: str) -> list[float]:
        extra = [a - b for a, b in zip(samples[f"{name}_s"], samples["pack_s"], strict=True)]
        return ratios(extra, samples["replay_s"])

    figures = samples | {f"{name}_over_replay": over_replay(name) for name in ("refit", "coded", "pursued")}
    return report("refit", llm, full._full.context_ids.numel(), keep_ratio, text_path, figures)
