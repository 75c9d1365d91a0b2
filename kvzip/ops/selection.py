"""From scores to keep masks: exact counts, deterministic ties."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated

import torch
from torch import Tensor

from kvzip.errors import BudgetError
from kvzip.parts import Range

PINNED = 1e30  # scores from here on are of pairs that are kept before all others, as far as the budget goes
NAN = "scores hold NaN: the model gave attention that is not a number"


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
        raise BudgetError(NAN)
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
    counts = split_evenly(budget, scores.shape[0])
    return torch.stack([_with_floor(layer, n, alpha) for layer, n in zip(scores, counts, strict=True)])


def select_floored(scores: Tensor, budget: int, *, alpha: Annotated[float, Range(0, 1)] = 0.2) -> Tensor:
    """The best pairs over all layers and heads, but no head gets less than `alpha` of an even share.

    alpha: 0 = `select_global`, 1 = `select_uniform` where `budget` is a multiple of the heads.
    """
    heads = scores.flatten(0, 1)
    return _with_floor(heads, budget, alpha).reshape(scores.shape)


def _with_floor(heads: Tensor, budget: int, alpha: float) -> Tensor:
    """Of heads [H, S] in one pool: the best `floor(alpha * (budget // H))` of each, and the best of all others."""
    safe = top_mask(heads, int(Fraction(str(alpha)) * (budget // len(heads))))
    lifted = heads.masked_fill(safe, torch.inf).reshape(1, -1)
    return top_mask(lifted, budget).reshape(heads.shape)


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


def select_threshold(scores: Tensor, *, threshold: float = 0.01) -> Tensor:
    """Every pair whose score is above `threshold`: the scores decide how many.

    Raises BudgetError where that is none, or a score is NaN.
    """
    if torch.isnan(scores).any():
        raise BudgetError(NAN)
    mask = scores > threshold
    if not mask.any():
        raise BudgetError(f"no pair has a score above the threshold {threshold:g}: give one below {scores.max():g}")
    return mask


def select_heads(scores: Tensor, budget: int) -> Tensor:
    """Whole heads in the order of their best score: as many as come nearest to `budget` pairs, at least one.

    scores: [L, Hkv, S] float32, read as a head score by its maximum over S.
    Returns [L, Hkv, S] bool, constant along S.
    """
    num_layers, num_kv_heads, length = scores.shape
    per_head = scores.amax(dim=-1).reshape(1, -1)
    count = min(max(round(budget / max(length, 1)), 1), per_head.numel())
    return top_mask(per_head, count).reshape(num_layers, num_kv_heads, 1).expand(scores.shape)


def select_counts(scores: Tensor, counts: Tensor) -> Tensor:
    """The best pairs of each head, `counts` [L, Hkv] int64 of them; ties go to the lower position."""
    rows = zip(scores.flatten(0, 1), counts.flatten().tolist(), strict=True)
    return torch.cat([top_mask(row.unsqueeze(0), count) for row, count in rows]).reshape(scores.shape)


def select_baklava(
    scores: Tensor, budget: int, profile: Mapping[str, Tensor], *, gamma: Annotated[float, Range(0)] = 0.5
) -> Tensor:
    """The best pairs of each head; a head gets as many as it is important in the profile, with its layer.

    profile: head_importance [L, Hkv] and layer_importance [L], not negative. Each over its largest, a head weighs
    head * (1 + gamma * layer); sizes are proportional to that (`proportional_counts`).
    Source: BaKlaVa (arXiv 2502.13176), by one proportional rule in place of its search.
    """
    heads, layers = (_over_largest(profile[name].double()) for name in ("head_importance", "layer_importance"))
    weights = heads * (1 + gamma * layers.unsqueeze(1))
    counts = proportional_counts(budget, weights.flatten().tolist(), scores.shape[-1])
    return select_counts(scores, torch.tensor(counts).reshape(weights.shape))


def _over_largest(values: Tensor) -> Tensor:
    return values / values.max().clamp_min(torch.finfo(values.dtype).tiny)


def proportional_counts(total: int, weights: list[float], capacity: int) -> list[int]:
    """`total` as integers of at most `capacity`, in proportion to `weights`; what one can't take goes to the others.

    weights: not negative; where all that still have room are 0, they share evenly. Fractions are rounded down, and the
    units this leaves go to the largest of them, of equal ones the first.
    """
    room, shares = total, [0.0] * len(weights)
    unsettled = list(range(len(weights)))
    while unsettled:
        mass = sum(weights[i] for i in unsettled)
        for i in unsettled:
            shares[i] = room * weights[i] / mass if mass > 0 else room / len(unsettled)
        full = [i for i in unsettled if shares[i] > capacity]
        if not full:
            break
        for i in full:
            shares[i] = capacity
        room -= capacity * len(full)
        unsettled = [i for i in unsettled if shares[i] < capacity]
    counts = [int(share) for share in shares]
    by_fraction = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
    for i in [i for i in by_fraction if counts[i] < capacity][: total - sum(counts)]:
        counts[i] += 1
    return counts


def select_duo(
    scores: Tensor,
    budget: int,
    profile: Mapping[str, Tensor],
    *,
    num_sinks: Annotated[int, Range(0)] = 64,
    num_recent: Annotated[int, Range(0)] = 256,
) -> Tensor:
    """Retrieval heads keep everything, streaming heads their first `num_sinks` and last `num_recent` pairs.

    profile: retrieval_scores [L, Hkv]; the highest are retrieval heads, as many as the budget can hold. What it leaves
    over lengthens the next head in order. A budget that is too small for streaming heads alone is split evenly, with
    sinks and recent pairs in the same proportion.  scores: read for their shape alone.
    Source: DuoAttention (arXiv 2410.10819).
    """
    length, num_heads = scores.shape[-1], scores.shape[0] * scores.shape[1]
    streaming = min(length, num_sinks + num_recent)
    spare = budget - num_heads * streaming
    if spare < 0:
        counts = torch.tensor(split_evenly(budget, num_heads))
        num_sinks = num_sinks * (budget // num_heads) // (num_sinks + num_recent)
    else:
        full, rest = divmod(spare, max(1, length - streaming))
        order = profile["retrieval_scores"].flatten().argsort(descending=True, stable=True)
        counts = torch.full((num_heads,), streaming)
        counts[order[:full]] = length
        counts[order[full : full + 1]] += rest
    by_place = sinks_then_recent(length, num_sinks).expand(scores.shape)
    return select_counts(by_place, counts.reshape(scores.shape[:2]))


def sinks_then_recent(length: int, num_sinks: int) -> Tensor:
    """Scores [length] float32 by position, in [0, 1): later is higher; the first `num_sinks` have 1."""
    by_position = torch.arange(length, dtype=torch.float64) / max(1, length)
    by_position[:num_sinks] = 1.0
    return by_position.float()


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


def pool_ranks(scores: Tensor, pool_dims: tuple[bool, bool]) -> Tensor:
    """256 x the share of pairs in the same pool that stand lower, as uint8 [Lf, Hkv, S].

    pool_dims: whether layers, and heads, share a pool.
    """
    num_layers, num_kv_heads, _ = scores.shape
    num_pools = (1 if pool_dims[0] else num_layers) * (1 if pool_dims[1] else num_kv_heads)
    pools = scores.reshape(num_pools, -1)
    order = pools.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(pools.shape[1] - 1, -1, -1).expand_as(pools)
    ranks = torch.empty_like(order).scatter_(1, order, places)
    return (ranks * 256 // max(1, pools.shape[1])).to(torch.uint8).reshape(scores.shape)
