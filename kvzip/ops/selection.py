"""From scores to keep masks: exact counts, deterministic ties."""

from __future__ import annotations

import torch
from torch import Tensor

from kvzip.errors import BudgetError


def top_mask(scores: Tensor, budget: int) -> Tensor:
    """Mask of the `budget` largest entries of each row.

    scores: [R, S] float32, no NaN.  budget: 0 <= budget <= S.
    Returns [R, S] bool with exactly `budget` True a row; of equal scores the lower index is kept.
    Raises BudgetError where the budget is out of range or a score is NaN.
    """
    length = scores.shape[1]
    if not 0 <= budget <= length:
        raise BudgetError(f"budget {budget} is out of range: a row has {length} KV pairs")
    if torch.isnan(scores).any():
        raise BudgetError("scores hold NaN: the model gave attention that is not a number")
    if budget == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(length - budget + 1, dim=1, keepdim=True).values
    above = scores > threshold
    ties = scores == threshold
    missing = budget - above.sum(dim=1, keepdim=True)
    return above | (ties & (ties.cumsum(dim=1) <= missing))


def select_global(scores: Tensor, budget: int) -> Tensor:
    """The `budget` best pairs over all layers and heads (KVzip's default).

    scores: [L, Hkv, S] float32.  Returns [L, Hkv, S] bool with exactly `budget` True; ties go to the lower
    (layer, head, position).
    """
    return top_mask(scores.reshape(1, -1), budget).reshape(scores.shape)


def select_layer(scores: Tensor, budget: int) -> Tensor:
    """The best pairs of each layer, pooled over its heads; layers get `budget` split evenly, the rest to the first."""
    counts = split_evenly(budget, scores.shape[0])
    masks = [top_mask(s.reshape(1, -1), n) for s, n in zip(scores, counts, strict=True)]
    return torch.cat(masks).reshape(scores.shape)


def select_uniform(scores: Tensor, budget: int) -> Tensor:
    """The best pairs of each head; heads get `budget` split evenly, the rest to the first (layer, head)."""
    rows = scores.reshape(-1, scores.shape[-1])
    low, more = divmod(budget, rows.shape[0])
    masks = [top_mask(rows[:more], low + 1)] if more else []
    return torch.cat([*masks, top_mask(rows[more:], low)]).reshape(scores.shape)


def select_heads(scores: Tensor, budget: int) -> Tensor:
    """Whole heads in the order of their best score: as many as come nearest to `budget` pairs, at least one.

    scores: [L, Hkv, S] float32, read as a head score by its maximum over S.
    Returns [L, Hkv, S] bool, constant along S.
    """
    num_layers, num_kv_heads, length = scores.shape
    per_head = scores.amax(dim=-1).reshape(1, -1)
    count = min(max(round(budget / max(length, 1)), 1), per_head.numel())
    return top_mask(per_head, count).reshape(num_layers, num_kv_heads, 1).expand(scores.shape)


def select_above(scores: Tensor, keep_ratio: float) -> Tensor:
    """The official repository's rule: strictly above the score at index `max(int(n * keep_ratio) - 1, 0)`.

    Keeps at most int(n * keep_ratio) - 1 pairs, fewer where scores tie. Only for parity with that code.
    """
    if keep_ratio >= 1:
        return torch.ones_like(scores, dtype=torch.bool)
    ordered = scores.flatten().sort(descending=True).values
    return scores > ordered[max(int(ordered.numel() * keep_ratio) - 1, 0)]


def split_evenly(total: int, parts: int) -> list[int]:
    """`total` as `parts` integers that differ by at most one, the larger first."""
    low, more = divmod(total, parts)
    return [low + 1] * more + [low] * (parts - more)
