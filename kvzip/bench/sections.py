"""The tables of `docs/results.md`, one function a benchmark: result files in, Markdown out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvzip.bench.cells import (
    Result,
    figure,
    least,
    mean,
    median,
    mib,
    milliseconds,
    seconds,
    section,
    share,
    subject,
    times,
)  # fmt: skip


def compress(results: list[Result]) -> str:
    """Scoring and peaks against a plain prefill."""
    head = ["model", "tokens", "plain prefill", "compress", "scoring / plain prefill", "peak / prefill peak", "KV kept"]
    rows = [
        [
            *subject(r),
            seconds(r, "plain_prefill_s"),
            seconds(r, "compress_s"),
            times(r, "score_over_prefill"),
            times(r, "peak_over_prefill_peak"),
            f"{mib(r['kv_nbytes'])} of {mib(r['full_kv_nbytes'])} ({r['full_kv_nbytes'] / r['kv_nbytes']:.2f}x less)",
        ]
        for r in results
    ]
    return section(
        "Compressing",
        "A plain prefill is one forward pass by transformers' own `sdpa` into its own full cache. Scoring is all that "
        "compressing adds to our own prefill: replay, selection, packing. Peaks are resident memory above what the "
        "process held with the model loaded.",
        head,
        rows,
    )


def kvpress(results: list[Result]) -> str:
    """kvpress' KVzipPress on the same tokens, in alternation with ours."""
    head = ["model", "tokens", "plain prefill", "kvpress on top", "kvzip on top", "kvpress / kvzip"]
    rows = [
        [
            *subject(r),
            seconds(r, "plain_prefill_s"),
            times(r, "kvpress_over_prefill"),
            times(r, "kvzip_over_prefill"),
            times(r, "kvpress_over_kvzip"),
        ]
        for r in results
    ]
    return section(
        "Against kvpress",
        "What `KVzipPress` of kvpress and what kvzip add to a prefill of the same tokens, each in its own process and "
        "environment, in alternation, as multiples of the plain prefill.",
        head,
        rows,
    )


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


def decode(results: list[Result]) -> str:
    """Attention alone, whole tokens, four questions at once."""
    attention = section(
        "Attention while decoding",
        "One token's attention over all full-attention layers, caches of random numbers, heads as unequal as KVzip "
        "leaves them; `sdpa` as transformers calls it, over the full cache. The bytes read are set against the "
        "measured read bandwidth of the machine. `codes` are the same pairs in four bits with biases, as the recipes "
        "store them.",
        [
            "model",
            "tokens",
            "backend",
            "sdpa, full",
            "kvzip, kept",
            "times faster",
            "read at",
            "at keep ratio 1",
            "codes",
            "kept / codes",
        ],
        [
            [
                *subject(r),
                r["backend"],
                milliseconds(r, "full_attention_s"),
                milliseconds(r, "attention_s"),
                times(r, "full_over_attention"),
                _read_rate(r),
                times(r, "full_over_attention_all"),
                milliseconds(r, "coded_attention_s"),
                times(r, "attention_over_coded"),
            ]
            for r in results
        ],
    )
    tokens = section(
        "Whole tokens",
        "Milliseconds a token of the whole model, batch 1: transformers with its full cache, with a compressed "
        "context, and transformers with an empty cache, which is the floor. The last column compares four questions "
        "asked one after another with the same four in one batch.",
        [
            "model",
            "tokens",
            "backend",
            "full cache",
            "compressed",
            "from codes",
            "empty cache",
            "full / compressed",
            "compressed / from codes",
            "four at once",
        ],
        [
            [
                *subject(r),
                r["backend"],
                milliseconds(r, "full_token_s"),
                milliseconds(r, "token_s"),
                milliseconds(r, "coded_token_s"),
                milliseconds(r, "empty_token_s"),
                times(r, "full_over_token"),
                times(r, "token_over_coded"),
                times(r, "alone_over_batch"),
            ]
            for r in results
        ],
    )
    return f"{attention}\n{tokens}"


def open_(results: list[Result]) -> str:
    """The first token from a reopened file."""
    head = ["model", "tokens", "prefill again", "open the file", "times sooner", "file"]
    rows = [
        [
            *subject(r),
            seconds(r, "prefill_first_token_s"),
            seconds(r, "open_first_token_s"),
            times(r, "prefill_over_open"),
            mib(r["file_nbytes"]),
        ]
        for r in results
    ]
    return section(
        "The first token of an answer",
        "Seconds from the question to the first token, the model loaded in both cases: by reading text and question "
        "again, and from a `.kvz` file that is opened, checked against its hash, and asked.",
        head,
        rows,
    )


def memory(results: list[Result]) -> str:
    """Peaks, and what stays."""
    head = ["model", "tokens", "plain prefill", "our prefill", "compress", "held afterwards", "KV kept", "full KV"]
    peaks = ("plain_peak_nbytes", "prefill_peak_nbytes", "compress_peak_nbytes", "held_nbytes")
    rows = [
        [*subject(r), *[mib(median(r, name)) for name in peaks], mib(r["kv_nbytes"]), mib(r["full_kv_nbytes"])]
        for r in results
    ]
    return section(
        "Memory",
        "Peak resident memory above the loaded model: of a prefill by transformers in one pass, of our prefill in "
        "blocks, and of compressing; and what is held when only the compressed context is left.",
        head,
        rows,
    )


def scale(results: list[Result]) -> str:
    """Time and memory against the length."""
    head = ["tokens", "prefill", "scoring", "peak", "full KV", "peak above full KV"]
    rows = [
        [
            f"{row['context_len']:,}",
            f"{row['prefill_s']:.3g} s",
            f"{row['score_s']:.3g} s",
            mib(row["peak_nbytes"]),
            mib(row["full_kv_nbytes"]),
            mib(row["peak_nbytes"] - row["full_kv_nbytes"]),
        ]
        for r in results
        for row in r["rows"]
    ]
    text = "A tiny Llama with random weights (two layers, two heads on one KV head of 32 dimensions), one run a length."
    return section("Long contexts", text, head, rows)


def provenance(results: list[Result]) -> str:
    """Where the numbers of a section come from, one line a result."""
    return "\n".join(["How these were measured:", "", *[_provenance(r) for r in results], ""])


def _provenance(r: Result) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in r["packages"].items())
    limits = ""
    if ceilings := r.get("ceilings"):
        read, product = ceilings["read_bytes_per_s"] / 1e9, ceilings["matmul_flops_per_s"] / 1e9
        limits = f", which reads {read:.1f} GB/s and multiplies at {product:.0f} GFLOP/s"
    runs = min(figure["n"] for figure in r["figures"].values())  # more where questions are counted
    return (
        f"- {r['model']}, {r['context_len']:,} tokens, keep ratio {r['keep_ratio']}, n = {runs}: `{r['command']}`, "
        f"{r['date']}, kvzip {r['kvzip']} at {r['commit'] or 'no checkout'}, Python {r['python']}, {packages}, "
        f"{r['dtype']}, {r['threads']} threads, {r['device']} on {r['machine']}{limits}"
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


def _read_rate(result: Result) -> str:
    rate, most = median(result, "attention_bytes_per_s"), result["ceilings"]["read_bytes_per_s"]
    return f"{rate / 1e9:.1f} GB/s ({100 * rate / most:.0f}%)"


SECTIONS: dict[str, Callable[[list[Result]], str]] = {
    "compress": compress,
    "kvpress": kvpress,
    "parity": parity,
    "agreement": agreement,
    "replay": replay,
    "distill": distill,
    "certificate": certificate,
    "decode": decode,
    "open": open_,
    "memory": memory,
    "scale": scale,
}
