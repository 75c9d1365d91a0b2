"""Which pairs stay, by scores and a budget."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvzip.methods import Method
from kvzip.ops.selection import pool_ranks, select_above
from kvzip.scorers.base import Profile


@dataclass(frozen=True)
class Selection:
    """What to keep.  mask: [Lf, Hkv, S] bool.  ranks: [Lf, Hkv, S] uint8 (see RaggedContext), or None.

    scores: [Lf, Hkv, S] float32 that decided, or None where nothing was scored.
    """

    mask: Tensor
    ranks: Tensor | None
    scores: Tensor | None = None


def select(
    scores: Tensor,
    method: Method,
    num_pairs: int | None,
    *,
    profile: Profile | None = None,
    faithful: bool = False,
    with_ranks: bool = True,
) -> Selection:
    """The keep mask by the budget of `method`; the official threshold rule if `faithful`.

    num_pairs: how many to keep; None where the budget decides that.  profile: of the model, where the budget needs it.
    """
    if faithful and num_pairs is not None:
        return Selection(select_above(scores, num_pairs / scores.numel()), None, scores)
    assert method.budget is not None and method.budget_kind is not None
    mask = method.budget_kind(scores, num_pairs, dict(method.budget.options), profile)
    ranks = pool_ranks(scores, method.budget_kind.pool_dims) if with_ranks else None
    return Selection(mask, ranks, scores)
