"""The CPU backend: PyTorch's fused CPU attention, which also returns the log-sum-exp."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvzip.backends.reference import ReferenceBackend, blocks_of, fold_batch, unfold_batch
from kvzip.context import RaggedLayer

MIN_ROWS = 32  # query rows of a KV head from which PyTorch's kernel uses several threads by itself
MIN_SPLIT, NUM_PARTS = 512, 4  # keys from which a segment is split, and into how many parts
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class CPUBackend(ReferenceBackend):
    """One fused call for dense keys, one a KV head for ragged ones; soft caps take the reference path."""

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scale: float,
        mask: Tensor | None = None,
        is_causal: bool = False,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        q_len, kv_len = query.shape[2], keys.shape[2]
        fits = kv_len > 0 and not (is_causal and q_len != kv_len)
        if softcap is not None or not fits or query.device.type != "cpu":
            return super().attend(query, keys, values, scale=scale, mask=mask, is_causal=is_causal, softcap=softcap)
        if mask is not None:
            return _attend_masked(query, keys, values, scale, mask)
        if is_causal and q_len > 1:
            return _call(query, keys, values, scale=scale, is_causal=True)
        batch, num_heads, _, head_dim = query.shape
        rows = query.reshape(batch, keys.shape[1], -1, head_dim)  # the queries of a KV head as rows: keys read once
        out, lse = _call(rows, keys, values, scale=scale)
        return out.reshape(batch, num_heads, q_len, head_dim), lse.reshape(batch, num_heads, q_len)

    def attend_level(
        self, query: Tensor, layer: RaggedLayer, *, scale: float, softcap: float | None = None
    ) -> tuple[Tensor, Tensor]:
        if softcap is not None or layer.device.type != "cpu":
            return super().attend_level(query, layer, scale=scale, softcap=softcap)
        rows = fold_batch(query, layer.num_kv_heads)
        parts = [_attend_head(rows[head], layer, head, scale) for head in range(layer.num_kv_heads)]
        return unfold_batch(torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts]), query)


def _attend_head(rows: Tensor, layer: RaggedLayer, head: int, scale: float) -> tuple[Tensor, Tensor]:
    """The rows [R, D] of one KV head: ([R, D], [R])."""
    parts = [part for block in blocks_of(layer, head) for part in _attend_block(rows, *block, scale)]
    if not parts:
        return torch.zeros_like(rows), torch.full(rows.shape[:1], -torch.inf)
    return _join(torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts]))


def _attend_block(
    rows: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts ([n, R, D], [n, R]). Few rows see many keys in parts, so that more threads are used."""
    bias = None if bias is None else bias.to(rows.dtype)
    split = NUM_PARTS if len(rows) < MIN_ROWS and len(keys) >= MIN_SPLIT else 1
    part_len = len(keys) // split
    yield _attend_parts(rows, keys, values, bias, split, part_len, scale)
    if rest := len(keys) - split * part_len:
        bias = None if bias is None else bias[-rest:]
        yield _attend_parts(rows, keys[-rest:], values[-rest:], bias, 1, rest, scale)


def _attend_parts(
    rows: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, split: int, part_len: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention to `split` runs of `part_len` keys, each on its own: ([split, R, D], [split, R])."""
    shape = (1, split, part_len, -1)
    taken = slice(0, split * part_len)
    mask = None if bias is None else bias[taken].reshape(1, split, 1, part_len).expand(-1, -1, len(rows), -1)
    query = rows.expand(1, split, -1, -1)
    out, lse = _call(query, keys[taken].reshape(shape), values[taken].reshape(shape), scale=scale, attn_mask=mask)
    return out[0], lse[0]


def _join(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Parts [n, R, D] and [n, R] joined by their log-sum-exp."""
    if len(out) == 1:
        return out[0], lse[0]
    total = torch.logsumexp(lse, dim=0)
    weights = torch.exp(lse - total).to(out.dtype)
    return (out * weights.unsqueeze(-1)).sum(dim=0), total


def _call(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    assert (
        query.stride(-1) == keys.stride(-1) == values.stride(-1) == 1
    )  # the kernel reads other strides as if they were
    out, lse = _flash(query, keys, values, 0.0, is_causal, attn_mask=attn_mask, scale=scale)
    return out, lse


def _attend_masked(query: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor) -> tuple[Tensor, Tensor]:
    additive = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
    shape = (query.shape[0], 1, query.shape[2], keys.shape[2])
    out, lse = _call(query, keys, values, scale=scale, attn_mask=additive.expand(shape))
    blind = ~mask.any(dim=-1).expand(query.shape[0], 1, query.shape[2])  # the kernel reports 0 for these rows
    return out.masked_fill(blind.unsqueeze(-1), 0.0), lse.masked_fill(blind, -torch.inf)
