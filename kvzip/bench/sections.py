"""The tables of `docs/results.md`, one function a benchmark: result files in, Markdown out."""

from __future__ import annotations

from collections.abc import Callable

from kvzip.bench import quality
from kvzip.bench.cells import (
    Result,
    median,
    mib,
    milliseconds,
    seconds,
    section,
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


def decode(results: list[Result]) -> str:
    """Attention alone, whole tokens, four questions at once."""
    return f"{_attention(results)}\n{_tokens(results)}"


def _attention(results: list[Result]) -> str:
    return section(
        "Attention while decoding",
        "One token's attention over all full-attention layers, caches of random numbers, heads as unequal as KVzip "
        "leaves them; `sdpa` as transformers calls it, over the full cache. The bytes read are set against the "
        "measured read bandwidth of the machine. `codes` are the same pairs with biases in the four-bit codes of "
        "`kvzip:small`.",
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


def _tokens(results: list[Result]) -> str:
    return section(
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


def serve(results: list[Result]) -> str:
    """Contexts on vLLM."""
    head = [
        "model",
        "tokens",
        "KV blocks, 4 questions",
        "in flight in a pool for one",
        "first token",
        "decoding",
        "plain",
    ]
    rows = [
        [
            *subject(r),
            f"{median(r, 'blocks'):.0f} of {median(r, 'plain_blocks'):.0f} ({median(r, 'blocks_ratio'):.2f}x)",
            f"{median(r, 'in_flight'):.0f} against {median(r, 'plain_in_flight'):.0f}",
            f"{times(r, 'first_token_ratio')} sooner",
            f"{times(r, 'decode_ratio')} faster",
            times(r, "plugin_ratio"),
        ]
        for r in results
    ]
    return section(
        "On vLLM",
        "Contexts of a store against the same text sent as a plain prompt, on the same engine, blocks of 32 tokens. "
        "Blocks: the most that are in use while four questions over one context are answered, the plain ones through "
        "the prefix cache. In flight: requests that run at a time, each with a text of its own, in a pool that holds "
        "one plain prompt. First token: of a context that no worker has open. Decoding: eight questions over two "
        "contexts of twice that length, 64 tokens each, the plain prompts' prefix being cached. Plain: seconds of "
        "prompts without a context on an engine with the plugin over those on stock vLLM, each on all cores; either is "
        "started first in half of the runs, as the second is the faster one even of two that are alike.",
        head,
        rows,
    )


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


def _read_rate(result: Result) -> str:
    rate, most = median(result, "attention_bytes_per_s"), result["ceilings"]["read_bytes_per_s"]
    return f"{rate / 1e9:.1f} GB/s ({100 * rate / most:.0f}%)"


SECTIONS: dict[str, Callable[[list[Result]], str]] = {
    "compress": compress,
    "kvpress": kvpress,
    "parity": quality.parity,
    "agreement": quality.agreement,
    "replay": quality.replay,
    "distill": quality.distill,
    "refit": quality.refit,
    "certificate": quality.certificate,
    "decode": decode,
    "open": open_,
    "memory": memory,
    "serve": serve,
    "served": quality.served,
    "scale": scale,
}
