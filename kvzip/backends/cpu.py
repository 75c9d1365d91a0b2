"""The CPU backend: PyTorch's fused CPU attention, which also returns the log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor

from kvzip.backends.reference import ReferenceBackend, fold_batch, unfold_batch
from kvzip.context import RaggedLayer

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

    def attend_ragged(
        self, query: Tensor, layer: RaggedLayer, *, scale: float, softcap: float | None = None
    ) -> tuple[Tensor, Tensor]:
        if softcap is not None or layer.keys.device.type != "cpu":
            return super().attend_ragged(query, layer, scale=scale, softcap=softcap)
        rows = fold_batch(query, layer.num_kv_heads)
        out = torch.zeros_like(rows)
        lse = torch.full(rows.shape[:2], -torch.inf)
        for head, (start, end) in enumerate(zip(layer.offsets, layer.offsets[1:], strict=False)):
            if start == end:
                continue
            bias = None if layer.bias is None else layer.bias[start:end].to(rows.dtype).reshape(1, 1, 1, -1)
            keys, values = layer.keys[None, None, start:end], layer.values[None, None, start:end]
            head_out, head_lse = _call(rows[None, None, head], keys, values, scale=scale, attn_mask=bias)
            out[head], lse[head] = head_out[0, 0], head_lse[0, 0]
        return unfold_batch(out, lse, query)


def _call(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    out, lse = _flash(query, keys, values, 0.0, is_causal, attn_mask=attn_mask, scale=scale)
    return out, lse


def _attend_masked(query: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor) -> tuple[Tensor, Tensor]:
    additive = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
    shape = (query.shape[0], 1, query.shape[2], keys.shape[2])
    out, lse = _call(query, keys, values, scale=scale, attn_mask=additive.expand(shape))
    blind = ~mask.any(dim=-1).expand(query.shape[0], 1, query.shape[2])  # the kernel reports 0 for these rows
    return out.masked_fill(blind.unsqueeze(-1), 0.0), lse.masked_fill(blind, -torch.inf)
