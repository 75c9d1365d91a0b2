"""Attention of a batch's tokens to contexts and to the tails behind them, on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvzip.backends import Backend
from kvzip.backends.native import NativeBackend, attend_paged, fits_paged
from kvzip.context import RaggedLayer
from kvzip.integrations.vllm.paged import BlockLayout
from kvzip.integrations.vllm.plan import Asked, Decoded, Plan, Tail
from kvzip.ops.attention import merge
from kvzip.ops.rope import turn


@dataclass(frozen=True)
class LayerRule:
    """What attention is in one layer.

    window: in tokens, or None.  cos, sin: [R/2] float32, of the rotation from where vLLM has a question's first token,
    right behind the handle, to where the context has it, at position 0.
    """

    backend: Backend
    scale: float
    window: int | None
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class Paged:
    """vLLM's cache of one layer [N, Hkv, block_size, 2 * D], and how blocks lie in it."""

    cache: Tensor
    layout: BlockLayout

    def read(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [R, Hkv, n * block_size, D] of blocks [R, n]; copies."""
        return self.layout.read(self.cache, blocks)

    def fits(self, rule: LayerRule, num_heads: int) -> bool:
        """Whether the compiled kernel reads it as it lies."""
        return isinstance(rule.backend, NativeBackend) and self.layout.is_plain and fits_paged(self.cache, num_heads)


def attend_asked(
    rule: LayerRule, query: Tensor, plan: Plan, contexts: Mapping[str, RaggedLayer], paged: Paged, output: Tensor
) -> None:
    """Fill the rows of `output` [T, Hq, D] whose tokens stand behind a context.

    query: [T, Hq, D] of the whole batch, rotated as vLLM does.  contexts: this layer of each, by key.  paged: where
    the tails are.
    """
    found = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[:2], dtype=torch.float32)
    if plan.decoded is not None:
        part = _attend_decoded(rule, query, plan.decoded, paged)
        found[plan.decoded.tokens], lse[plan.decoded.tokens] = part
    for tail in plan.longer:
        found[tail.tokens], lse[tail.tokens] = _attend_longer(rule, query, tail, paged)
    for key, asked in plan.asked.items():
        rows = query[asked.tokens]
        before, before_lse = _attend_context(rule, rows, asked, contexts[key])
        joined, _ = merge(found[asked.tokens], lse[asked.tokens], before, before_lse)
        output[asked.tokens] = joined


def _attend_decoded(rule: LayerRule, query: Tensor, decoded: Decoded, paged: Paged) -> tuple[Tensor, Tensor]:
    """The one new token of each of R requests over its tail: ([R, Hq, D], [R, Hq])."""
    rows = query[decoded.tokens]
    if paged.fits(rule, query.shape[1]):
        return attend_paged(rows, paged.cache, decoded.blocks, decoded.lengths, scale=rule.scale, window=rule.window)
    keys, values = paged.read(decoded.blocks)
    places, lengths = torch.arange(keys.shape[2]), decoded.lengths.unsqueeze(1)
    mask = places < lengths
    if rule.window is not None:
        mask &= places >= lengths - rule.window
    out, lse = rule.backend.attend(rows.unsqueeze(2), keys, values, scale=rule.scale, mask=mask[:, None, None])
    return out.squeeze(2), lse.squeeze(2)


def _attend_longer(rule: LayerRule, query: Tensor, tail: Tail, paged: Paged) -> tuple[Tensor, Tensor]:
    """The new tokens of one request over its tail: ([T, Hq, D], [T, Hq])."""
    keys, values = (rows[:, :, : tail.length] for rows in paged.read(tail.blocks.long().unsqueeze(0)))
    rows = query[tail.tokens].transpose(0, 1).unsqueeze(0)
    if tail.first == 0 and (rule.window is None or tail.length <= rule.window):
        out, lse = rule.backend.attend(rows, keys, values, scale=rule.scale, is_causal=True)
    else:
        places, own = torch.arange(tail.length), torch.arange(tail.first, tail.length).unsqueeze(1)
        mask = places <= own
        if rule.window is not None:
            mask &= places > own - rule.window
        out, lse = rule.backend.attend(rows, keys, values, scale=rule.scale, mask=mask[None, None])
    return out[0].transpose(0, 1), lse[0].transpose(0, 1)


def _attend_context(rule: LayerRule, rows: Tensor, asked: Asked, layer: RaggedLayer) -> tuple[Tensor, Tensor]:
    """Tokens [T, Hq, D] over the context that they ask: ([T, Hq, D], [T, Hq])."""
    turned = turned_back(rule, rows).transpose(0, 1).unsqueeze(0).contiguous()
    if layer.window is None:
        out, lse = rule.backend.attend_ragged(turned, layer, scale=rule.scale)
    else:
        keys, values = (t.view(1, layer.num_kv_heads, -1, t.shape[-1]) for t in layer.dense())
        out, lse = attend_window(rule, turned, asked.positions, keys, values)
    return out[0].transpose(0, 1), lse[0].transpose(0, 1)


def turned_back(rule: LayerRule, rows: Tensor) -> Tensor:
    """Queries [T, Hq, D] as they are where the context has them: turned in the dtype of `rule.cos`, rounded once."""
    return turn(rows, rule.cos, rule.sin).to(rows.dtype)


def attend_window(
    rule: LayerRule, turned: Tensor, positions: Tensor, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Queries [1, Hq, T, D] at `positions` [T] behind a context, over its last tokens that are still in their window.

    keys, values: [1, Hkv, n, D], the last n tokens of the context.
    Returns ([1, Hq, T, D], [1, Hq, T]); a query that sees nothing any more gives 0 and -inf.
    """
    assert rule.window is not None
    behind = torch.arange(keys.shape[2], 0, -1, device=turned.device)  # tokens from the context's end
    mask = behind <= (rule.window - 1 - positions).unsqueeze(1)
    return rule.backend.attend(turned, keys, values, scale=rule.scale, mask=mask[None, None])
