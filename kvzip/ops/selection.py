"""From scores to keep masks: exact counts, deterministic ties."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated

import torch
from torch import Tensor

from kvzip.errors import BudgetError
from kvzip.parts import Range

PINNED = 1e30  # scores from here on are of pairs that are kept before all others, as far as the budget goes


def pin_first(scores: Tensor, count: int) -> Tensor:
    """`scores` [..., S] with the first `count` positions pinned, in place: the first one highest."""
    scores[..., :count] = PINNED * (3 - torch.arange(count) / max(1, count))
    return scores


def pin_last(scores: Tensor, count: int) -> Tensor:
    """`scores` [..., S] with the last `count` positions pinned, in place: the last one highest."""
    scores[..., scores.shape[-1] - count :] = PINNED * (1 + torch.arange(1, count + 1) / max(1, count))
    return scores


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


def select_adakv(scores: Tensor, budget: int, *, alpha: Annotated[float, Range(0, 1)] = 0.2) -> Tensor:
    """The best pairs of each layer, pooled over its heads, but no head gets less than `alpha` of an even share.

    Layers get `budget` split evenly; of a layer's count n, each head's best `floor(alpha * (n // Hkv))` are kept, the
    rest goes to the best of the layer. alpha: 0 = `select_layer`, 1 = `select_uniform` where n is a multiple of Hkv.
    Source: Ada-KV (arXiv 2407.11550), in the form of kvpress, whose total is exact.
    """
    num_layers, num_kv_heads, _ = scores.shape
    masks = []
    for layer, count in zip(scores, split_evenly(budget, num_layers), strict=True):
        safe = top_mask(layer, int(Fraction(str(alpha)) * (count // num_kv_heads)))
        lifted = layer.masked_fill(safe, torch.inf).reshape(1, -1)
        masks.append(top_mask(lifted, count).reshape(layer.shape))
    return torch.stack(masks)


def select_pyramid(scores: Tensor, budget: int, *, beta: Annotated[float, Range(1)] = 20.0) -> Tensor:
    """The best pairs of each head, more of them in the lower layers; the same count in all heads of a layer.

    beta: the last layer gets 1/beta of an even share. Pinned pairs are counted, but are no part of the shares.
    Source: PyramidKV (arXiv 2406.02069).
    """
    num_layers, num_kv_heads, length = scores.shape
    pinned = int((scores >= PINNED).sum(dim=-1).min())
    fixed = num_kv_heads * pinned
    if budget < num_layers * fixed:
        return select_uniform(scores, budget)
    shares = pyramid_counts(budget - num_layers * fixed, num_layers, num_kv_heads * (length - pinned), beta)
    counts = [fixed + share for share in shares]
    return torch.cat([select_uniform(s.unsqueeze(0), n) for s, n in zip(scores, counts, strict=True)])


def pyramid_counts(total: int, num_layers: int, capacity: int, beta: float) -> list[int]:
    """`total` as a non-increasing list of `num_layers` integers of at most `capacity`, as near as can be to a line.

    The line ends at mean/beta and begins at twice the mean less that; where this is above `capacity`, it begins there
    and is flatter, down to a flat line for a total of num_layers * capacity. What the integer parts leave over goes to
    the first layers that have room.
    """
    mean = Fraction(total, num_layers)
    first = min(2 * mean - mean / Fraction(str(beta)), Fraction(capacity))
    slope = 2 * (first - mean) / max(1, num_layers - 1)
    counts = [int(first - slope * layer) for layer in range(num_layers)] if num_layers > 1 else [total]
    with_room = [layer for layer, count in enumerate(counts) if count < capacity]
    for layer in with_room[: total - sum(counts)]:
        counts[layer] += 1
    return counts


def keep_pinned_layers(scores: Tensor, budget: int) -> tuple[Tensor, int]:
    """Which layers are pinned throughout, [L] bool, and how much of the budget they leave to the others.

    Raises BudgetError where they need more than there is.
    """
    pinned = (scores >= PINNED).all(dim=-1).all(dim=-1)
    taken = int(pinned.sum()) * scores[0].numel()
    if taken > budget or (taken == budget and not pinned.all()):
        raise BudgetError(
            f"the budget of {budget} KV pairs is too small: layers that keep everything need {taken} of them, "
            "and the others need some; keep more, or let fewer layers keep everything"
        )
    return pinned, budget - taken


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
