"""Random compressed contexts: ragged, with empty heads, sliding windows, biases, ranks and tails."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvzip.context import ContextInfo, RaggedContext, RaggedLayer, SavedTail
from kvzip.ops.quantize import Layout, quantize
from kvzip.ops.ragged import pack_bits

Layouts = tuple[Layout | None, Layout | None]

INFO = ContextInfo(
    model="tiny",
    fingerprint="TinyForCausalLM:0123456789abcdef01234567",
    method="kvzip",
    dtype="float32",
    keep_ratio_asked=0.3,
    budget_asked=None,
    keep_ratio=0.3125,
    full_kv_nbytes=4096,
    source="Übersicht \U0001f600 \n 2.txt",
    loss={"kl": 0.125, "n": 3, "per_question": [0.25, 0.0]},
)


@dataclass(frozen=True)
class Shape:
    """What a random context looks like.

    windows: one a layer, None = full attention, at least one None.  keep: chance that a pair of the context is kept.
    tail_len: tokens of the stored session, or None for no session.  num_pending: 0 or 1 ids not yet in the tail.
    levels: layouts of keys and values of each level of the full-attention layers, which share the pairs at random.
    """

    windows: tuple[int | None, ...] = (None, 5, None)
    num_kv_heads: int = 2
    head_dim: int = 4
    prefix_len: int = 3
    context_len: int = 11
    keep: float = 0.4
    dtype: torch.dtype = torch.float32
    has_bias: bool = False
    half_bias: bool = False
    has_ranks: bool = True
    tail_len: int | None = None
    num_pending: int = 0
    turns: tuple[tuple[str, str], ...] = ()
    levels: tuple[Layouts, ...] = ((None, None),)


def random_context(shape: Shape, seed: int = 0) -> tuple[RaggedContext, SavedTail | None]:
    """A context of that shape and its tail; the same one for the same seed."""
    rng = torch.Generator().manual_seed(seed)
    mask_shape = (shape.windows.count(None), shape.num_kv_heads, shape.context_len)
    masks = torch.rand(mask_shape, generator=rng) < shape.keep
    ranks = torch.randint(0, 256, mask_shape, generator=rng, dtype=torch.uint8) if shape.has_ranks else None
    full = iter(masks)
    layers = tuple(_layer(shape, window, None if window else next(full), rng) for window in shape.windows)
    ids = torch.randint(0, 50_000, (shape.prefix_len + shape.context_len,), generator=rng, dtype=torch.int32)
    prefix_ids, context_ids = ids[: shape.prefix_len], ids[shape.prefix_len :]
    context = RaggedContext(layers, prefix_ids, context_ids, pack_bits(masks), ranks, INFO)
    return context, None if shape.tail_len is None else _tail(shape, shape.tail_len, rng)


def _layer(shape: Shape, window: int | None, mask: Tensor | None, rng: torch.Generator) -> RaggedLayer:
    if mask is None:
        num_recent = min(window or 0, shape.prefix_len + shape.context_len + 1) - 1
        seqlens = torch.full((shape.num_kv_heads,), num_recent)
    else:
        seqlens = mask.sum(dim=-1) + shape.prefix_len
    first = shape.levels[:1] if mask is not None else ((None, None),)
    layer = _level(shape, seqlens if len(shape.levels) == 1 or mask is None else seqlens // 2, window, first[0], rng)
    if mask is None or len(shape.levels) == 1:
        return layer
    assert len(shape.levels) == 2
    return replace(layer, lower=_level(shape, seqlens - seqlens // 2, window, shape.levels[1], rng))


def _level(shape: Shape, seqlens: Tensor, window: int | None, layouts: Layouts, rng: torch.Generator) -> RaggedLayer:
    offsets = torch.cat([torch.zeros(1), seqlens.cumsum(0)]).to(torch.int32)
    num_pairs = int(offsets[-1])
    numbers = torch.randn(2, num_pairs, shape.head_dim, generator=rng).to(shape.dtype)
    keys, values = (
        pairs if layout is None else quantize(pairs, tuple(offsets.tolist()), layout)
        for pairs, layout in zip(numbers, layouts, strict=True)
    )
    bias = torch.randn(num_pairs, generator=rng) if shape.has_bias else None
    bias = bias.half() if bias is not None and shape.half_bias else bias
    return RaggedLayer(keys, values, offsets, window, bias)


def _tail(shape: Shape, tail_len: int, rng: torch.Generator) -> SavedTail:
    size = (len(shape.windows), 1, shape.num_kv_heads, tail_len, shape.head_dim)
    keys, values = (torch.randn(size, generator=rng).to(shape.dtype) for _ in range(2))
    token_ids = torch.randint(0, 50_000, (tail_len + shape.num_pending,), generator=rng, dtype=torch.int32)
    starts = tuple(token_ids.numel() * i // len(shape.turns) for i in range(len(shape.turns)))
    return SavedTail(tuple(keys), tuple(values), token_ids, shape.turns, starts)
