"""Attention that also returns the log-sum-exp of its rows, and the merge of two such parts.

This is the slow, obvious form: float32, every logit in memory. It is the oracle of every backend, and serves where
no faster form exists (soft cap, devices without a fused kernel). Shape letters as in `docs/how-it-works.md`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor


def soft_capped(logits: Tensor, softcap: float | None) -> Tensor:
    """`softcap * tanh(logits / softcap)`, or the logits themselves where `softcap` is None."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    is_causal: bool = False,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of grouped queries, with the log-sum-exp of each row.

    query: [B, Hq, T, D].  keys, values: [B, Hkv, S, D] with Hq a multiple of Hkv, S >= 0.
    mask: bool, broadcastable to [B, 1, T, S], True = may attend.  is_causal: row t sees keys up to S - T + t.
    bias: float32 broadcastable to [B, Hkv, 1, S], added to the logits after the soft cap.
    Returns ([B, Hq, T, D] in the dtype of `query`, [B, Hq, T] float32). A row that sees nothing gives 0 and -inf.
    """
    batch, num_heads, q_len, head_dim = query.shape
    num_kv_heads, kv_len = keys.shape[1], keys.shape[2]
    rows = query.reshape(batch, num_kv_heads, -1, q_len, head_dim).float()
    logits = soft_capped(rows @ keys.float().unsqueeze(2).transpose(-1, -2) * scale, softcap)  # [B, Hkv, G, T, S]
    if bias is not None:
        logits = logits + bias.float().unsqueeze(2)
    if is_causal:
        past = torch.ones(q_len, kv_len, dtype=torch.bool, device=query.device).tril(kv_len - q_len)
        logits = logits.masked_fill(~past, -torch.inf)
    if mask is not None:
        logits = logits.masked_fill(~mask.unsqueeze(2), -torch.inf)
    lse = torch.logsumexp(logits, dim=-1) if kv_len else logits.new_full(logits.shape[:-1], -torch.inf)
    weights = torch.exp(logits - lse.clamp_min(torch.finfo(torch.float32).min).unsqueeze(-1))
    out = weights @ values.float().unsqueeze(2)
    return out.reshape(query.shape).to(query.dtype), lse.reshape(batch, num_heads, q_len)


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint key sets, from the attention over each.

    out_*: [..., T, D].  lse_*: [..., T] float32; -inf means the row saw nothing in that part.
    Returns (out, lse) of the union.  Source: FlashAttention's split-K reduction (arXiv 2205.14135).
    """
    weight_a = torch.sigmoid(lse_a - lse_b).nan_to_num_(0.0)  # -inf - -inf: neither part saw anything
    out = torch.lerp(out_b, out_a, weight_a.unsqueeze(-1).to(out_a.dtype))
    return out, torch.logaddexp(lse_a, lse_b)


def column_max(
    query: Tensor,
    keys: Tensor,
    lse: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    block_logits: int = 1 << 20,
) -> Tensor:
    """The largest attention weight that each key receives from any query of its KV head.

    query: [Hq, T, D].  keys: [Hkv, S, D].  lse: [Hq, T] float32, the log-sum-exp of each row over all the keys that
    its softmax runs over (`keys` may be a part of them).  block_logits: logits that exist at a time (one row of S at
    least); few enough to stay in a CPU's cache, where they are made and reduced.
    Returns [Hkv, S] float32 in [0, 1]. No exponential is taken before the maximum: exp is monotonic.
    """
    num_kv_heads, kv_len, head_dim = keys.shape
    rows = (query.float() * scale).reshape(num_kv_heads, -1, head_dim)
    row_lse = lse.reshape(num_kv_heads, -1, 1)
    step = max(1, block_logits // max(1, kv_len))
    best = torch.full((num_kv_heads, kv_len), -torch.inf, device=keys.device)
    block = best.new_empty(min(step, rows.shape[1]), kv_len)
    for head, columns in enumerate(keys.float().transpose(1, 2)):
        for start in range(0, rows.shape[1], step):
            taken = rows[head, start : start + step]
            logits = torch.mm(taken, columns, out=block[: len(taken)])
            logits = soft_capped(logits, softcap).sub_(row_lse[head, start : start + step])
            torch.maximum(best[head], logits.amax(dim=0), out=best[head])
    return best.exp_().clamp_max_(1.0)


def causal_columns(
    query: Tensor,
    keys: Tensor,
    lse: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    reduce: Literal["sum", "max"] = "sum",
    block_logits: int = 1 << 20,
) -> Tensor:
    """The attention weights that each key receives from the queries of its KV head, summed up or the largest of them.

    query: [Hq, T, D].  keys: [Hkv, S, D], S >= T; row t sees keys up to S - T + t.  lse: [Hq, T] float32 over those.
    block_logits: logits that exist at a time (one row of S at least).
    Returns [Hkv, S] float32: a key that no row sees has 0.
    """
    found = torch.zeros(keys.shape[:2], device=keys.device)
    for head, _, weights, _ in _causal_blocks(query, keys, lse, scale, softcap, block_logits):
        if reduce == "max":
            torch.maximum(found[head], weights.amax(dim=0), out=found[head])
        else:
            found[head] += weights.sum(dim=0)
    return found


def mass_between(
    query: Tensor,
    keys: Tensor,
    lse: Tensor,
    first: int,
    num_recent: int,
    *,
    scale: float,
    softcap: float | None = None,
    block_logits: int = 1 << 20,
) -> Tensor:
    """The share of its attention that each query pays the keys from index `first` on but the last `num_recent` it sees.

    query, keys, lse, block_logits: as in `causal_columns`.  Returns [Hq, T] float32 in [0, 1].
    """
    found = torch.zeros(keys.shape[0], query.numel() // (keys.shape[0] * query.shape[2]), device=keys.device)
    columns = torch.arange(keys.shape[1], device=keys.device)
    for head, rows, weights, last_seen in _causal_blocks(query, keys, lse, scale, softcap, block_logits):
        far = (columns >= first) & (columns <= last_seen - num_recent)
        found[head, rows] = weights.masked_fill_(~far, 0.0).sum(dim=1)
    return found.reshape(query.shape[:2]).clamp_max_(1.0)


def _causal_blocks(
    query: Tensor, keys: Tensor, lse: Tensor, scale: float, softcap: float | None, block_logits: int
) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
    """Blocks of attention weights [rows, S]: KV head, which of its G*T rows, weights, the last key that a row sees."""
    num_kv_heads, kv_len, head_dim = keys.shape
    q_len = query.shape[1]
    rows = (query.float() * scale).reshape(num_kv_heads, -1, head_dim)
    row_lse = lse.reshape(num_kv_heads, -1, 1)
    last_seen = (torch.arange(rows.shape[1], device=keys.device) % q_len + kv_len - q_len).unsqueeze(1)
    columns = torch.arange(kv_len, device=keys.device)
    step = max(1, block_logits // max(1, kv_len))
    for head in range(num_kv_heads):
        transposed = keys[head].float().t()
        for start in range(0, rows.shape[1], step):
            part = slice(start, start + step)
            weights = soft_capped(rows[head, part] @ transposed, softcap).sub_(row_lse[head, part]).exp_()
            weights = weights.clamp_max_(1.0).masked_fill_(columns > last_seen[part], 0.0)
            yield head, part, weights, last_seen[part]
