"""What a compressed context kept, as one self-contained page: no network, no outside fonts or scripts.

All text from the context reaches the page escaped, in HTML or in JSON, and the script only ever sets text, never
markup. A content security policy admits the page's own style and script by their hashes and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from kvzip.context import RaggedContext
from kvzip.files import write_whole
from kvzip.inspect import summary

DETAIL_LIMIT = 6_000_000  # pairs; the rank of each one is a byte of the page up to here, counts per token beyond
COARSE_STEPS = tuple(range(5, 101, 5))  # percent kept, where only counts are stored


def to_html(context: RaggedContext, token_texts: Sequence[str]) -> str:
    """The page as text: facts, heat map, histogram, and the context with a slider over the keep ratio.

    token_texts: one a context token (`summary.token_texts`).  Raises InputError if their number is wrong.
    """
    summary.check_texts(context, token_texts)
    source = summary.one_line(re.split(r"[\\/]", context.info.source or "")[-1] or "the context", 120)
    facts = summary.facts(context)
    style, script = _resource("page.css"), _resource("page.js")
    parts = {
        "policy": _policy(style, script),
        "title": escape(f"What was kept of {source}"),
        "source": escape(source),
        "lead": _prose(_lead(context)),
        "facts": "\n".join(f"<div><dt>{name}</dt><dd>{_prose(value)}</dd></div>" for name, value in facts),
        "sliding": "\n".join(f'<p class="note">{escape(line)}</p>' for line in _sliding_notes(context)),
        "style": style,
        "script": script,
        "data": _script_json(_page_data(context, token_texts)),
    }
    # one pass, so that a placeholder inside the context is not replaced
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _resource("page.html"))


def write_html(context: RaggedContext, token_texts: Sequence[str], path: str | os.PathLike[str]) -> None:
    """Write the page of `to_html` to a file, whole or not at all. Raises FileError if it can't be written."""
    write_whole(path, to_html(context, token_texts).encode())


def _prose(text: str) -> str:
    """Escaped text in which no line breaks between a number and its unit."""
    return re.sub(r"(?<=\d) (?=%|[KMG]iB\b|s\b)", "\u00a0", escape(text))


def _resource(name: str) -> str:
    return files("kvzip.inspect").joinpath(name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _script_json(data: Any) -> str:
    """JSON that can stand inside a script element: ASCII, and no character that could end the element."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _lead(context: RaggedContext) -> str:
    before, after = summary.format_bytes(context.info.full_kv_nbytes), summary.format_bytes(context.kv_nbytes)
    kept = summary.format_percent(context.info.keep_ratio)
    tokens = f"{context.context_len:,} tokens"
    size = f"{after} instead of {before}, a factor of {summary.factor(context)}"
    return f"Of the key–value pairs of {tokens}, {kept} stay: {size}."


def _sliding_notes(context: RaggedContext) -> list[str]:
    return [
        f"Not compressed, so not in the map: sliding-window layers {summary.format_ranges(layers)}, "
        f"which see the last {window:,} tokens only."
        for layers, window in summary.sliding_layers(context)
    ]


def _page_data(context: RaggedContext, token_texts: Sequence[str]) -> dict[str, Any]:
    """What the script draws from.

    texts: one a token, safe to show.  layers: index of each full-attention layer.  stored: keep ratio of the file.
    storedPairs: context pairs it holds.  pairBytes: bytes of one pair.  bits: the keep mask, eight pairs a byte.
    ranks, or tokenSteps and headSteps: see `_rank_data`.  agreement: `rank_agreement`.
    """
    _, num_kv_heads, length = context.kept_shape
    return {
        "texts": [summary.printable(text) for text in token_texts],
        "length": length,
        "heads": num_kv_heads,
        "layers": list(context.full_layers),
        "prefix": context.prefix_len,
        "stored": context.info.keep_ratio,
        "storedPairs": int(context.keep_mask.sum()),
        "nbytes": context.kv_nbytes,
        "fullBytes": context.info.full_kv_nbytes,
        "pairBytes": summary.bytes_per_pair(context),
        "bits": _base64(context.kept_bits),
        "agreement": summary.rank_agreement(context),
        **_rank_data(context),
    }


def _rank_data(context: RaggedContext) -> dict[str, Any]:
    """The ranks [Lf, Hkv, S] uint8 themselves, or, for large contexts, what stays at each of COARSE_STEPS:
    tokenSteps [steps, S] uint16 and headSteps [steps, Lf, Hkv] uint32, little-endian."""
    if context.ranks is None:
        return {}
    if context.ranks.numel() <= DETAIL_LIMIT:
        return {"ranks": _base64(context.ranks)}
    masks = (summary.mask_at(context, step / 100) for step in COARSE_STEPS)
    counts = [(mask.sum(dim=(0, 1)), mask.sum(dim=2)) for mask in masks]
    return {
        "steps": list(COARSE_STEPS),
        "tokenSteps": _base64(torch.stack([tokens for tokens, _ in counts]).to(torch.uint16)),
        "headSteps": _base64(torch.stack([heads for _, heads in counts]).to(torch.uint32)),
    }


def _base64(tensor: Tensor) -> str:
    array = tensor.cpu().contiguous().numpy()
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()).decode()
