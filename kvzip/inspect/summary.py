"""From a compressed context to the numbers and words that the pictures show. Pure functions, no output.

Shares count the context alone: the prefix and sliding-window layers are never compressed and are left out.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol

from torch import Tensor

from kvzip.budget import times_in
from kvzip.context import Pairs, RaggedContext, RaggedLayer
from kvzip.errors import InputError

VISIBLE_FORMATS = "\u200c\u200d"  # the joiners: Persian and emoji need them, and they reorder nothing
LOOKAHEAD = 4  # a UTF-8 character is at most four byte tokens long


class Decoder(Protocol):
    """The part of a transformers tokenizer that is used here."""

    def decode(self, token_ids: Any, /, **options: Any) -> Any: ...


def head_counts(context: RaggedContext) -> Tensor:
    """Context pairs kept by each head of the full-attention layers: [Lf, Hkv] int64."""
    return context.keep_mask.sum(dim=-1)


def head_share(context: RaggedContext) -> Tensor:
    """Share of the context's pairs that each head kept: [Lf, Hkv] float32 in [0, 1]."""
    return head_counts(context).float() / max(1, context.context_len)


def pairs_per_token(context: RaggedContext) -> int:
    """Pairs that one context token has before eviction: Lf * Hkv."""
    num_layers, num_kv_heads, _ = context.kept_shape
    return num_layers * num_kv_heads


def token_counts(context: RaggedContext) -> Tensor:
    """Pairs kept of each context token, over all full-attention layers and heads: [S] int64."""
    return context.keep_mask.flatten(0, 1).sum(dim=0)


def importance(context: RaggedContext) -> Tensor:
    """Share of its pairs that each context token kept: [S] float32 in [0, 1]; 1 if no layer was compressed."""
    total = pairs_per_token(context)
    counts = token_counts(context).float()
    return counts / total if total else counts + 1


def token_histogram(context: RaggedContext, bins: int = 10) -> list[int]:
    """Tokens by the share of their pairs that was kept: `bins + 1` counts that sum to S.

    The first counts tokens without any pair; the i-th after it shares above (i - 1) / bins up to i / bins.
    """
    total = max(1, pairs_per_token(context))
    counts = [0] * (bins + 1)
    for kept in token_counts(context).tolist():
        counts[-(-kept * bins // total)] += 1
    return counts


def min_rank(keep_ratio: float) -> int:
    """The lowest rank that stays at a keep ratio: the least integer >= 256 * (1 - keep_ratio)."""
    return math.ceil(256 * (1 - keep_ratio) - 1e-9)


def mask_at(context: RaggedContext, keep_ratio: float) -> Tensor:
    """The keep mask that the ranks give at a keep ratio: [Lf, Hkv, S] bool.

    Raises InputError if the context holds no ranks, or the ratio is not in (0, 1].
    """
    if context.ranks is None:
        raise InputError("this context holds no ranks: compress it again to store them")
    if not 0 < keep_ratio <= 1:
        raise InputError(f"keep ratio {keep_ratio} is out of range: give 0 < keep_ratio <= 1")
    return context.ranks.cpu() >= min_rank(keep_ratio)


def rank_agreement(context: RaggedContext) -> float | None:
    """Share of pairs where the ranks, at the reached keep ratio, give the keep mask itself; None without ranks."""
    if context.ranks is None or not 0 < context.info.keep_ratio <= 1 or not context.ranks.numel():
        return None
    same = mask_at(context, context.info.keep_ratio) == context.keep_mask
    return float(same.float().mean())


def bytes_per_pair(context: RaggedContext) -> float:
    """Mean bytes of one pair in the full-attention layers, offsets left out; 0 if they hold none."""
    layers = [context.layers[i] for i in context.full_layers]
    pairs = sum(sum(layer.seqlens) for layer in layers)
    offsets = sum(level.cu_seqlens.nbytes for layer in layers for level in layer.levels)
    return (sum(layer.nbytes for layer in layers) - offsets) / pairs if pairs else 0.0


def sliding_layers(context: RaggedContext) -> list[tuple[list[int], int]]:
    """The layers that are not compressed, as (layer indices, window in tokens), one entry a window size."""
    groups: dict[int, list[int]] = {}
    for index, layer in enumerate(context.layers):
        if layer.window is not None:
            groups.setdefault(layer.window, []).append(index)
    return [(indices, window) for window, indices in groups.items()]


def inspect_json(context: RaggedContext) -> dict[str, Any]:
    """All metadata and counts as JSON types; the keys are a contract.

    All fields of ContextInfo, context_len and prefix_len (tokens), kv_nbytes (bytes), full_layers (the compressed
    ones), shared_layers (layer: the lower one whose pairs it uses), resident_kv_nbytes (in memory at a step),
    index_nbytes (of clusters) and pairs_per_head [L][Hkv], prefix and sliding windows included.
    """
    return {
        **context.info.to_dict(),
        "context_len": context.context_len,
        "prefix_len": context.prefix_len,
        "kv_nbytes": context.kv_nbytes,
        "resident_kv_nbytes": context.resident_kv_nbytes,
        "index_nbytes": index_nbytes(context),
        "full_layers": list(context.full_layers),
        "shared_layers": {str(layer): source for layer, source in context.shared.items()},
        "pairs_per_head": context.pairs_per_head,
    }


def index_nbytes(context: RaggedContext) -> int:
    """Bytes of the clusters that find fetched pairs; 0 where none are fetched."""
    return sum(layer.clusters.nbytes for layer in context.layers if layer.clusters is not None)


def facts(context: RaggedContext) -> list[tuple[str, str]]:
    """What is known of the context as (name, value) lines, safe to print; unknown ones are left out."""
    info = context.info
    asked = info.budget_asked if info.keep_ratio_asked is None else format_percent(info.keep_ratio_asked)
    asked = f", asked {asked}" if asked else ""
    before, after = format_bytes(info.full_kv_nbytes), format_bytes(context.kv_nbytes)
    shared = ", ".join(f"{layer} uses {source}" for layer, source in context.shared.items())
    lines = [
        ("Source", info.source),
        ("Model", info.model),
        ("Method", info.method),
        ("Context", f"{context.context_len:,} tokens + {context.prefix_len:,} of prefix"),
        ("Kept", f"{format_percent(info.keep_ratio)} of the KV pairs{asked}"),
        ("Chosen", info.chosen),
        ("Shared layers", shared),
        ("Memory", f"{after} instead of {before}, factor {factor(context)}"),
        ("Resident", context.is_fetched and _resident(context)),
        ("Loss", info.loss and loss_line(info.loss)),
        ("Stored as", _stored_as(context)),
        ("Time", f"{info.total_s:.1f} s: prefill {info.prefill_s:.1f} s, scoring {info.score_s:.1f} s"),
        ("System prompt", info.system),
        ("Instruction", info.instruction),
        ("Created", info.created),
        ("Version", info.kvzip_version and f"kvzip {info.kvzip_version}"),
    ]
    return [(name, one_line(value)) for name, value in lines if value]


def _stored_as(context: RaggedContext) -> str:
    """The dtype, and the bits of keys and values where these are codes, as "codes of 8 + 6, 3 + 3 bits", by level."""
    found = {f"{_bits(level.keys)} + {_bits(level.values)}": None for level in _coded_levels(context)}
    return f"codes of {', '.join(found)} bits, read as {context.info.dtype}" if found else context.info.dtype


def _coded_levels(context: RaggedContext) -> Iterator[RaggedLayer]:
    return (level for layer in context.stored_layers.values() for level in layer.levels if level.is_quantized)


def _bits(pairs: Pairs) -> int:
    return 8 * pairs.dtype.itemsize if isinstance(pairs, Tensor) else pairs.layout.bits


def _resident(context: RaggedContext) -> str:
    resident, index = format_bytes(context.resident_kv_nbytes), format_bytes(index_nbytes(context))
    return f"{resident} at a step, {index} of them clusters; the rest stays in the file"


def factor(context: RaggedContext) -> str:
    """Bytes of the full cache over bytes that are kept: "3.2×".

    Beside float32, of codes and where times were asked for, also what these count: "16.1× (8.0× of 16-bit numbers)".
    """
    info = context.info
    times = info.full_kv_nbytes / max(1, context.kv_nbytes)
    counts_16_bits = any(_coded_levels(context)) or times_in(info.budget_asked) is not None
    halved = f" ({times / 2:.1f}× of 16-bit numbers)" if counts_16_bits and info.dtype == "float32" else ""
    return f"{times:.1f}×{halved}"


def loss_line(loss: Mapping[str, Any]) -> str:
    """A measured loss in words: "0.012 nats a token (95 %: below 0.031), 97 % of 48 tokens agree".

    loss: see `kvzip.context.LOSS_RANGES`; what it does not say is left out.
    """
    parts = [f"{loss['kl']:.2g} nats a token"] if "kl" in loss else []
    if parts and {"kl_bound", "confidence"} <= loss.keys():
        parts[0] += f" ({percent_label(loss['confidence'])} %: below {loss['kl_bound']:.2g})"
    if {"agreement", "tokens"} <= loss.keys():
        parts.append(f"{percent_label(loss['agreement'])} % of {loss['tokens']:,} tokens agree")
    return ", ".join(parts)


def one_line(text: str, limit: int = 300) -> str:
    """The text made printable, on one line, cut to `limit` characters."""
    flat = " ".join(printable(text).split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"


def format_bytes(nbytes: float) -> str:
    """Bytes in the largest binary unit that gives at least 1: "5.2 MiB"."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} GiB"


def format_percent(share: float) -> str:
    """A share in [0, 1] as "29.8 %"."""
    return f"{100 * share:.1f} %"


def percent_label(share: float) -> str:
    """A share in whole percent, at most three characters: 0 and 100 only where they are exact."""
    if 0 < share < 0.005:
        return "<1"
    return str(min(99, round(100 * share)) if share < 1 else 100)


def format_ranges(indices: Sequence[int]) -> str:
    """Ascending integers with their runs joined: [0, 1, 2, 5] -> "0–2, 5"."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs)


def printable(text: str) -> str:
    """The text with everything that could act instead of show made visible; newlines and tabs stay.

    Control characters (ESC too), format characters (bidirectional marks, zero-width spaces, tags), surrogates and line
    separators become their code: "⟨U+001B⟩".
    """
    return "".join(map(_visible, text.replace("\r\n", "\n")))


def _visible(char: str) -> str:
    if char in "\n\t" or " " <= char <= "~":
        return char
    hidden = unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") and char not in VISIBLE_FORMATS
    return f"⟨U+{ord(char):04X}⟩" if hidden else char


def check_texts(context: RaggedContext, token_texts: Sequence[str]) -> None:
    """Raises InputError unless there is one text a context token."""
    if len(token_texts) != context.context_len:
        have, need = len(token_texts), context.context_len
        raise InputError(f"{have} token texts for {need} context tokens: give one text a token")


def glyph_spans(token_texts: Sequence[str]) -> list[tuple[int, int]]:
    """Runs of tokens that show one text, as (start, stop) that cover all tokens in order.

    A token without text belongs to the next one that has some: together they spell a character.
    """
    stops = [i + 1 for i, text in enumerate(token_texts) if text]
    if len(token_texts) > (stops[-1] if stops else 0):
        stops.append(len(token_texts))
    return list(pairwise([0, *stops]))


def token_texts(tokenizer: Decoder, ids: Iterable[int]) -> list[str]:
    """The text of each token; joined, they are exactly the decoded text of `ids`, special tokens included.

    A character that takes several tokens belongs to its last one, the others are "".
    """
    token_ids = [int(i) for i in ids]

    def decode(start: int, stop: int) -> str:
        text: str = tokenizer.decode(token_ids[start:stop], skip_special_tokens=False, **_RAW)
        return text

    cuts, before, start, done = [0], "", 0, 0  # `before` is the text of token_ids[start:done]
    for stop in range(1, len(token_ids) + 1):
        text = decode(start, stop)
        whole = stop == len(token_ids) or not text.endswith("\ufffd")
        if whole or decode(start, stop + LOOKAHEAD).startswith(text):
            cuts.append(cuts[-1] + max(0, len(text) - len(before)))
            start, done = done, stop
            before = decode(start, done)
        else:
            cuts.append(cuts[-1])
    full = decode(0, len(token_ids))
    cuts[-1] = len(full)  # so the join is exact even for a tokenizer whose decoding is not additive
    return [full[a:b] for a, b in pairwise(min(cut, len(full)) for cut in cuts)]


_RAW = {"clean_up_tokenization_spaces": False}
