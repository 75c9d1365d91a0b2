"""The sections of the page on what is chosen and what it loses: scores, kept pairs, mending, the certificate."""

from __future__ import annotations

from typing import Any

from kvzip.bench.cells import (
    Result,
    figure,
    least,
    mean,
    median,
    seconds,
    section,
    share,
    subject,
    times,
)  # fmt: skip


def parity(results: list[Result]) -> str:
    """kvpress' scores, kept pairs and answers beside ours."""
    ratios = ("0.5", "0.3", "0.1")
    pairs = section(
        "Parity with kvpress",
        "`KVzipPress` of kvpress and kvzip on the same token ids. Rank correlation is Spearman's between the scores of "
        "the context's tokens, head by head; overlap is the share of kept pairs that both keep, at three keep ratios. "
        "The rows below the first differ in nothing, or in one thing alone.",
        ["model", "tokens", "what is compared", "rank correlation, median", "least", *[f"overlap {r}" for r in ratios]],
        [
            [*subject(r), label, *_ranks(r, f"{stage}_spearman"), *[least(r, f"{stage}_overlap_{k}") for k in ratios]]
            for r in results
            for stage, label in r["stages"].items()
            if f"{stage}_overlap_{ratios[0]}" in r["figures"]
        ],
    )
    answers = section(
        "Answers beside kvpress'",
        "Greedy answers to the same questions in the same tokens: how many hold a gold answer, their F1, each with its "
        "standard error, and how many are equal to another's word for word.",
        ["model", "tokens", "answers of", "gold answer in it", "F1", "equal answers"],
        [
            [*subject(r), row["answers"], *["{:.3f} ± {:.3f}".format(*row[m]) for m in ("included", "f1")], _same(row)]
            for r in results
            for row in r["answers"]
        ],
    )
    return f"{pairs}\n{answers}"


def agreement(results: list[Result]) -> str:
    """Other presses of kvpress beside our methods."""
    ratios = ("0.5", "0.3", "0.1")
    pair = "{:.4f} ({:.4f})".format
    return section(
        "Agreement with kvpress' other presses",
        "Scores and kept pairs on the same token ids, head by head: the median over the heads and, in parentheses, the "
        "least. Each press as it is, then with matching options, then with one choice that differs. Rank correlation "
        "is Spearman's; overlap is the share of kept pairs that both keep, at three keep ratios.",
        ["model", "tokens", "press", "what is compared", "rank correlation", *[f"overlap {r}" for r in ratios]],
        [
            [
                *subject(r),
                row["press"],
                row["what"],
                pair(*row["spearman"]) if "spearman" in row else "-",
                *[pair(*row["overlap"][ratio]) for ratio in ratios],
            ]
            for r in results
            for row in r["rows"]
        ],
    )


def replay(results: list[Result]) -> str:
    """Global against local replay."""
    head = [
        "model", "tokens", "global / prefill", "local / prefill", "local / global", "scorer / local forward",
        "rank correlation", "overlap 0.3", "overlap 0.5", "KL 0.3, global", "KL 0.3, local",
        "KL 0.5, global", "KL 0.5, local",
    ]  # fmt: skip
    ratios = ("global_over_prefill", "local_over_prefill", "local_over_global", "scorer_over_local_forward")
    shares = ("rank_correlation", "overlap_0.3", "overlap_0.5")
    losses = ("global_kl_0.3", "local_kl_0.3", "global_kl_0.5", "local_kl_0.5")
    rows = [
        [
            *subject(r),
            *[times(r, name) for name in ratios],
            *[f"{median(r, name):.3f}" for name in shares],
            *[mean(r, name) for name in losses],
        ]
        for r in results
    ]
    return section(
        "Global and local replay",
        "A locally replayed chunk sees the prefix and itself, not the rest of the context. Times are multiples of a "
        "plain prefill. Rank correlation (Spearman) is that of all scores, overlap that of the kept pairs. KL is "
        "KL(full || compressed) in nats, the mean over questions (and its standard error) of the mean over the tokens "
        "of the full cache's greedy answer.",
        head,
        rows,
    )


def distill(results: list[Result]) -> str:
    """Foretold scores against those of a replay."""
    head = [
        "model", "tokens", "scorer / prefill", "replay / prefill", "rank correlation", "overlap 0.5", "overlap 0.3",
        "KL 0.5, kvzip", "KL 0.5, kvzip-fast", "times", "KL 0.3, kvzip", "KL 0.3, kvzip-fast", "times", "learned from",
    ]  # fmt: skip
    rows = [
        [
            *subject(r),
            figure(r, "fast_over_prefill", lambda v: f"{v:.3f}", "x"),
            times(r, "kvzip_over_prefill"),
            *[f"{median(r, name):.3f}" for name in ("rank_correlation", "overlap_0.5", "overlap_0.3")],
            *[cell for ratio in ("0.5", "0.3") for cell in _losses(r, ratio)],
            r["learned_from"],
        ]
        for r in results
    ]
    return section(
        "Foretold scores",
        "`kvzip-fast` on text that its weights were not fitted to. The scorer's time is by its own clock, over "
        "that of the prefill it watches; the replay's is that of `kvzip`. Rank correlation (Spearman) is that of all "
        "scores, overlap the share of the pairs kept by `kvzip` that `kvzip-fast` keeps too, one budget for all layers "
        "and heads. KL is as above; `times` is the mean of `kvzip-fast` over that of `kvzip`.",
        head,
        rows,
    )


def certificate(results: list[Result]) -> str:
    """The measured loss against that on real questions."""
    head = [
        "model", "tokens", "texts", "compared at", "Spearman, ratios", "Spearman, methods too", "within a text",
        "measured / true", "true below the bound", "cost / prefill",
    ]  # fmt: skip
    rows = [
        [
            *subject(r),
            str(r["texts"]),
            figure(r, "tokens", lambda v: f"{v:.0f}", ""),
            f"{median(r, 'spearman'):.3f}",
            f"{median(r, 'spearman_methods'):.3f}",
            figure(r, "spearman_within", lambda v: f"{v:.3f}", ""),
            figure(r, "certified_over_true", lambda v: f"{v:.2f}", "x"),
            share(r, "bound_holds"),
            figure(r, "cost_over_prefill", lambda v: f"{v:.3f}", "x"),
        ]
        for r in results
    ]
    return section(
        "The measured loss",
        "The certificate's KL, from spans of the text alone, beside the true one: KL(full || compressed) in nats a "
        "token over the full cache's greedy answers to five real questions. Spearman's rank correlation over texts "
        "and keep ratios of `kvzip`, and over texts and all cells: `kvzip` at five keep ratios, `kvzip+refit`, "
        "`kvzip+int4` and `snapkv`. `compared at` is the number of tokens. The bound is for the mean over spans of the "
        "text; how often the true KL is below it is shown, not promised. The cost is that of both passes, by their "
        "own clock.",
        head,
        rows,
    )


def served(results: list[Result]) -> str:
    """Answers through vLLM."""
    head = ["model", "tokens", "texts", "kept", "KL", "gold answer in it", "the plain prompt's answer"]
    rows = []
    for r in results:
        about = [*subject(r), str(r["texts"])]
        rows.append([*about, "all (plain prompt)", "-", share(r, "full_right"), "-"])
        for way in (name.removesuffix("_kl") for name in r["figures"] if name.endswith("_kl")):
            cells = mean(r, f"{way}_kl"), share(r, f"{way}_right"), share(r, f"{way}_same")
            rows.append([*about, way.replace("-", " "), *cells])
    return section(
        "Answers through vLLM",
        "Questions of SQuAD texts to contexts in a store and to the text as a plain prompt, on one engine. Ragged: "
        "each head has its own count. Portable: one count in all heads, for stock attention backends. KL: of the plain "
        "prompt from the context, in nats a token of the plain prompt's answer, over its 50 likeliest tokens and all "
        "others as one, with its standard error over the questions.",
        head,
        rows,
    )


def refit(results: list[Result]) -> str:
    """Mending against the replay."""
    head = ["model", "tokens", "keep ratio", "replay", "packing", "with refit", "refit / replay", "into codes / replay",
            "with pursued keys / replay"]  # fmt: skip
    rows = [
        [
            *subject(r),
            f"{r['keep_ratio']:g}",
            seconds(r, "replay_s"),
            seconds(r, "pack_s"),
            seconds(r, "refit_s"),
            times(r, "refit_over_replay"),
            times(r, "coded_over_replay"),
            times(r, "pursued_over_replay"),
        ]
        for r in results
    ]
    return section(
        "Refitting",
        "What `refit` adds to packing, over the replay whose queries it uses; on one prefill, in alternation. What it "
        "gains is among the evaluations below.",
        head,
        rows,
    )


def _ranks(result: Result, name: str) -> list[str]:
    """Median and least, or that it is not a matter of ranks."""
    found = result["figures"].get(name)
    return [f"{found['median']:.4f}", f"{found['min']:.4f}"] if found else ["-", "-"]


def _same(row: dict[str, Any]) -> str:
    return "; ".join(f"{equal} of {total} as {other}" for other, (equal, total) in row["same"].items()) or "-"


def _losses(result: Result, ratio: str) -> list[str]:
    """KL of both methods, and the ratio of the means."""
    names = f"kvzip_kl_{ratio}", f"fast_kl_{ratio}"
    kvzip, fast = (sum(result["figures"][name]["values"]) / result["figures"][name]["n"] for name in names)
    return [*[mean(result, name) for name in names], f"{fast / kvzip:.2f}x"]
