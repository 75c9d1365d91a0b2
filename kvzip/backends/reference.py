"""The portable backend: plain matrix products in float32, blocks of queries. Runs on any device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvzip.context import RaggedLayer
from kvzip.ops import attention

READ_BLOCK = 1024  # quantized pairs of a head that are read at a time
BLOCK_LOGITS = 1 << 24  # logits held at a time: 64 MiB of float32


class ReferenceBackend:
    """`kvzip.ops.attention.attend`, cut into blocks of queries so that memory stays bounded."""

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
        if is_causal:
            mask = torch.ones(q_len, kv_len, dtype=torch.bool, device=query.device).tril(kv_len - q_len)[None, None]
        step = max(1, BLOCK_LOGITS // max(1, query.shape[0] * query.shape[1] * kv_len))
        parts = [
            attention.attend(
                query[:, :, i : i + step],
                keys,
                values,
                scale=scale,
                mask=None if mask is None else mask.expand(*mask.shape[:2], q_len, kv_len)[:, :, i : i + step],
                softcap=softcap,
            )
            for i in range(0, q_len, step)
        ]
        return torch.cat([out for out, _ in parts], dim=2), torch.cat([lse for _, lse in parts], dim=2)

    def attend_ragged(
        self, query: Tensor, layer: RaggedLayer, *, scale: float, softcap: float | None = None
    ) -> tuple[Tensor, Tensor]:
        out, lse = self.attend_level(query, layer, scale=scale, softcap=softcap)
        for level in layer.levels[1:]:
            more = self.attend_level(query, level, scale=scale, softcap=softcap)
            out, lse = attention.merge(out, lse, *more)
        return out, lse

    def attend_level(
        self, query: Tensor, layer: RaggedLayer, *, scale: float, softcap: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `attend_ragged`, over the pairs of one precision."""
        rows = fold_batch(query, layer.num_kv_heads)
        parts = [self._attend_head(rows[h : h + 1], layer, h, scale, softcap) for h in range(layer.num_kv_heads)]
        return unfold_batch(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), query)

    def decode(
        self,
        query: Tensor,
        layer: RaggedLayer,
        keys: Tensor,
        values: Tensor,
        *,
        scale: float,
        softcap: float | None = None,
    ) -> Tensor:
        tail = self.attend(query, keys, values, scale=scale, softcap=softcap)
        return attention.merge(*tail, *self.attend_ragged(query, layer, scale=scale, softcap=softcap))[0]

    def _attend_head(
        self, rows: Tensor, layer: RaggedLayer, head: int, scale: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        """The rows [1, R, D] of one KV head."""
        out, lse = torch.zeros_like(rows), rows.new_full(rows.shape[:2], -torch.inf, dtype=torch.float32)
        for keys, values, bias in blocks_of(layer, head):
            shaped = None if bias is None else bias.reshape(1, 1, 1, -1)
            block = attention.attend(
                rows[:, None], keys[None, None], values[None, None], scale=scale, bias=shaped, softcap=softcap
            )
            out, lse = attention.merge(out, lse, block[0][:, 0], block[1][:, 0])
        return out, lse


def blocks_of(layer: RaggedLayer, head: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Keys [n, D], values and biases of one head: as they lie, or, quantized, read block by block; nothing if empty."""
    first, end = layer.offsets[head], layer.offsets[head + 1]
    step = READ_BLOCK if layer.is_quantized else end - first
    for start in range(0, end - first, max(1, step)):
        stop = min(start + step, end - first)
        bias = None if layer.bias is None else layer.bias[first + start : first + stop]
        yield *layer.read(head, start, stop), bias


def fold_batch(query: Tensor, num_kv_heads: int) -> Tensor:
    """[B, Hq, T, D] -> [Hkv, B * G * T, D]: all queries that read the same segment, as rows."""
    batch, _, q_len, head_dim = query.shape
    if batch == 1:
        return query.reshape(num_kv_heads, -1, head_dim)
    grouped = query.reshape(batch, num_kv_heads, -1, q_len, head_dim)
    return grouped.transpose(0, 1).reshape(num_kv_heads, -1, head_dim)


def unfold_batch(out: Tensor, lse: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `fold_batch` for outputs [Hkv, B * G * T, D] and their log-sum-exp [Hkv, B * G * T]."""
    batch, num_heads, q_len, head_dim = query.shape
    if batch == 1:
        return out.reshape(query.shape), lse.reshape(batch, num_heads, q_len)
    grouped = (out.shape[0], batch, -1, q_len)
    outputs = out.reshape(*grouped, head_dim).transpose(0, 1).reshape(batch, num_heads, q_len, head_dim)
    return outputs, lse.reshape(grouped).transpose(0, 1).reshape(batch, num_heads, q_len)
