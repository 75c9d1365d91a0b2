"""Caches of random numbers in the shape of a model: how long attention takes does not depend on what they hold."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import DynamicCache

from kvzip.compressed import CompressedContext
from kvzip.context import ContextInfo, RaggedContext, RaggedLayer
from kvzip.llm import LLM
from kvzip.methods import parse_method
from kvzip.ops.ragged import pack_bits
from kvzip.transforms import get_transform
from kvzip.transforms.base import Evicted

SPREAD = 1.0  # standard deviation of the logarithm of the heads' shares


def random_full_cache(llm: LLM, context_len: int, batch: int = 1) -> DynamicCache:
    """transformers' own cache with `context_len` tokens in it."""
    cache = DynamicCache(config=llm.model.config)
    gen = torch.Generator().manual_seed(0)
    for index, layer in enumerate(llm.geometry.layers):
        shape = (batch, layer.num_kv_heads, context_len, layer.head_dim)
        keys, values = (torch.randn(shape, generator=gen).to(llm.model.device, llm.model.dtype) for _ in range(2))
        cache.update(keys, values, index)
    return cache


def random_context(llm: LLM, context_len: int, keep_ratio: float) -> CompressedContext:
    """A compressed context of `context_len` tokens and no prefix, its heads as unequal as KVzip leaves them."""
    geometry, gen = llm.geometry, torch.Generator().manual_seed(1)
    num_kv_heads = geometry.layers[geometry.full_layers[0]].num_kv_heads
    counts = head_counts(len(geometry.full_layers), num_kv_heads, context_len, keep_ratio)
    ends = iter(counts)
    layers, masks = [], torch.arange(context_len) < counts.unsqueeze(-1)
    for layer in geometry.layers:
        recent = min(context_len, (layer.window or 1) - 1)
        seqlens = torch.full((layer.num_kv_heads,), recent) if layer.window else next(ends)
        offsets = torch.nn.functional.pad(seqlens.cumsum(0), (1, 0)).to(torch.int32)
        keys, values = (torch.randn(int(offsets[-1]), layer.head_dim, generator=gen) for _ in range(2))
        layers.append(RaggedLayer(keys, values, offsets, layer.window))
    info = ContextInfo(
        model=llm.name,
        fingerprint=llm.fingerprint,
        method="random",
        dtype=llm.dtype_name,
        keep_ratio_asked=keep_ratio,
        budget_asked=None,
        keep_ratio=float(masks.float().mean()),
        full_kv_nbytes=geometry.kv_nbytes(context_len, llm.model.dtype),
    )
    ids = torch.zeros(context_len, dtype=torch.int32)
    data = RaggedContext(tuple(layers), ids[:0], ids, pack_bits(masks), None, info)
    return CompressedContext(llm, data.to(llm.model.device, llm.model.dtype))


def in_codes(context: CompressedContext, name: str) -> CompressedContext:
    """The same context with biases, its full-attention layers stored by the transform of that name."""
    (part,), gen = parse_method(name).transforms, torch.Generator().manual_seed(4)
    transform, data = get_transform(part), context.data

    def coded(layer: RaggedLayer) -> RaggedLayer:
        if layer.window is not None:
            return layer
        bias = torch.randn(layer.offsets[-1], generator=gen).half().to(layer.device)
        keep_mask = torch.ones(1, 1, dtype=torch.bool)
        assert isinstance(layer.keys, Tensor) and isinstance(layer.values, Tensor)
        return transform.apply(replace(layer, bias=bias), Evicted(layer.keys, layer.values, keep_mask, 0))

    layers = tuple(map(coded, data.layers))
    return CompressedContext(context.llm, replace(data, layers=layers))


def head_counts(num_layers: int, num_kv_heads: int, context_len: int, keep_ratio: float) -> Tensor:
    """Pairs of each head [L, Hkv] int64: log-normal shares, `keep_ratio` of all pairs together, to a few pairs."""
    shares = torch.exp(SPREAD * torch.randn(num_layers, num_kv_heads, generator=torch.Generator().manual_seed(2)))
    low, high = 0.0, 1e6
    for _ in range(60):  # the factor at which the capped shares have the mean that is asked for
        middle = (low + high) / 2
        low, high = (middle, high) if (shares * middle).clamp_max(1).mean() < keep_ratio else (low, middle)
    return ((shares * high).clamp_max(1) * context_len).round().long()
