"""How many KV pairs may stay: a keep ratio, a count of pairs, or bytes; always resolved to an exact count."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvzip.errors import BudgetError, UnknownNameError
from kvzip.ops import selection
from kvzip.scorers.base import Profile

UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class BudgetKind:
    """How a total is divided over layers and heads.

    select: (scores [Lf, Hkv, S], pairs, options by keyword) -> keep mask.  pool_dims: which of (layer, head) compete
    for the same pairs.  scorer: the only scorer it goes with, or None.  needs: a profile of the model, by its name in
    `kvzip.scorers.base.NEEDS`; `select` is given it behind `pairs`.  decides_count: it keeps as many as it sees fit;
    `select` is not given `pairs` then, and nobody may ask for a keep ratio.
    """

    select: Callable[..., Tensor]
    pool_dims: tuple[bool, bool]
    help: str
    source: str
    scorer: str | None = None
    needs: frozenset[str] = frozenset()
    decides_count: bool = False

    def __call__(
        self, scores: Tensor, pairs: int | None, options: Mapping[str, Any], profile: Profile | None = None
    ) -> Tensor:
        """The keep mask [Lf, Hkv, S]; layers that are pinned throughout stay whole, the others share the rest.

        pairs: how many to keep; None where the kind decides that.  profile: where the kind needs one.
        """
        if pairs is None:
            assert self.decides_count
            return self.select(scores, **options)
        pinned, rest = selection.keep_pinned_layers(scores, pairs)
        if not pinned.any():
            return self._divide(scores, pairs, options, profile)
        mask = torch.ones_like(scores, dtype=torch.bool)
        if not pinned.all():
            others = profile and {name: value[~pinned] for name, value in profile.items()}
            mask[~pinned] = self._divide(scores[~pinned], rest, options, others)
        return mask

    def _divide(self, scores: Tensor, pairs: int, options: Mapping[str, Any], profile: Profile | None) -> Tensor:
        if self.needs:
            assert profile is not None
            return self.select(scores, pairs, profile, **options)
        return self.select(scores, pairs, **options)


BUDGET_KINDS = {
    "global": BudgetKind(
        selection.select_global, (True, True), "one threshold over all layers and heads", "KVzip, arXiv 2505.23416"
    ),
    "layer": BudgetKind(
        selection.select_layer,
        (False, True),
        "the same count in every layer, pooled over its heads",
        "KVzip's comparison, arXiv 2505.23416",
    ),
    "uniform": BudgetKind(
        selection.select_uniform, (False, False), "the same count in every head", "SnapKV, arXiv 2404.14469"
    ),
    "adakv": BudgetKind(
        selection.select_adakv,
        (False, True),
        "as layer, but each head keeps at least a share",
        "Ada-KV, arXiv 2407.11550",
    ),
    "floored": BudgetKind(
        selection.select_floored,
        (True, True),
        "as global, but each head keeps at least a share",
        "Ada-KV's floor, arXiv 2407.11550, under KVzip's threshold",
    ),
    "pyramid": BudgetKind(
        selection.select_pyramid,
        (False, False),
        "as uniform, but more in the lower layers, falling linearly",
        "PyramidKV, arXiv 2406.02069",
    ),
    "head": BudgetKind(
        selection.select_heads,
        (True, True),
        "whole heads, by the model's head profile",
        "KVzip, arXiv 2505.23416",
        scorer="head-profile",
    ),
    "threshold": BudgetKind(
        selection.select_threshold,
        (True, True),
        "every pair whose score is above a threshold",
        "ReFreeKV, arXiv 2502.16886",
        decides_count=True,
    ),
    "baklava": BudgetKind(
        selection.select_baklava,
        (False, False),
        "to each head by its importance in a profile of the model",
        "BaKlaVa, arXiv 2502.13176",
        needs=frozenset({"baklava_profile"}),
    ),
    "duo": BudgetKind(
        selection.select_duo,
        (False, False),
        "everything to the heads that look far back, sinks and recent tokens to the others",
        "DuoAttention, arXiv 2410.10819",
        scorer="sinks-recent",
        needs=frozenset({"duo_profile"}),
    ),
}


def get_budget_kind(name: str) -> BudgetKind:
    """The budget kind of that name. Raises UnknownNameError."""
    if name not in BUDGET_KINDS:
        raise UnknownNameError.of("budget", name, BUDGET_KINDS)
    return BUDGET_KINDS[name]


def check_keep_ratio(keep_ratio: float | str) -> float:
    """`keep_ratio` as a float, 0 < r <= 1. Raises BudgetError."""
    if isinstance(keep_ratio, bool) or not isinstance(keep_ratio, (int, float)) or not 0 < keep_ratio <= 1:
        raise BudgetError(
            f"keep ratio {keep_ratio!r} is out of range: give 0 < r <= 1, the fraction of KV pairs to keep"
        )
    return float(keep_ratio)


@dataclass(frozen=True)
class Amounts:
    """What a budget is taken of.  num_pairs: context pairs in full-attention layers.  fixed_nbytes: bytes that stay
    whatever is evicted (prefix, sliding windows, offsets).  pair_nbytes: bytes of one pair, at most.  full_nbytes:
    bytes that prefix and context take in a full cache of 16-bit numbers, what "8x" is an eighth of."""

    num_pairs: int
    fixed_nbytes: int
    pair_nbytes: float
    full_nbytes: int

    def pairs_within(self, nbytes: int) -> int:
        """How many context pairs there is room for; below 1 where there is none."""
        return min(int((nbytes - self.fixed_nbytes) // self.pair_nbytes), self.num_pairs)

    def times_text(self, nbytes: int) -> str:
        """How many times smaller than the full cache so many bytes are, as it may be asked for: "8.3x"."""
        return f"{math.floor(10 * self.full_nbytes / nbytes) / 10:g}x"


@dataclass(frozen=True)
class Size:
    """What a recipe keeps: as many pairs as a cache so many times smaller than a full one of 16-bit numbers has room
    for, but at least the keep ratio `least`: of a short text the prefix, which always stays, takes much of the room.

    times: at least 1.  least: 0 < r <= 1.
    """

    times: float
    least: float

    def __str__(self) -> str:
        return f"{self.times:g}x"

    def num_pairs(self, amounts: Amounts) -> int:
        """The number of context pairs to keep."""
        room = amounts.pairs_within(int(amounts.full_nbytes / self.times))
        return max(room, resolve_pairs(self.least, None, amounts))


def resolve_pairs(keep_ratio: float | None, budget: int | str | None, amounts: Amounts) -> int:
    """The number of context pairs to keep, at least 1.

    keep_ratio: fraction of `num_pairs`.  budget: a count of context pairs, or what the whole compressed cache may take
    as text: bytes ("48MiB", "200 MB"), or how many times less than a full one of 16-bit numbers ("8x"). Exactly one of
    the two is given.  Raises BudgetError.
    """
    if (keep_ratio is None) == (budget is None):
        raise BudgetError("give either keep_ratio or budget, not both and not neither")
    if keep_ratio is not None:
        return max(1, round(check_keep_ratio(keep_ratio) * amounts.num_pairs))
    if isinstance(budget, str):
        pairs = amounts.pairs_within(parse_size(budget, amounts.full_nbytes))
        if pairs < 1:
            least = math.ceil(amounts.fixed_nbytes + amounts.pair_nbytes)
            needs = f"this context needs at least {least} bytes, {amounts.times_text(least)}"
            raise BudgetError(f"budget {budget!r} is too small: {needs}")
        return pairs
    if isinstance(budget, bool) or not isinstance(budget, int) or not 1 <= budget <= amounts.num_pairs:
        raise BudgetError(
            f"budget {budget!r} is out of range: give 1 to {amounts.num_pairs} KV pairs, bytes as '64MiB', or '8x'"
        )
    return budget


def parse_size(text: int | str, full_nbytes: int, what: str = "budget") -> int:
    """Bytes as by `parse_nbytes`, or of "8x", an eighth of `full_nbytes`, at least "1x". Raises BudgetError."""
    times = times_in(text)
    if times is None:
        return parse_nbytes(text, what, ", or 8x for an eighth of the full cache in 16-bit numbers")
    if times < 1:
        raise BudgetError(f"{what} {text!r} is out of range: give how many times smaller, at least 1x")
    return int(full_nbytes / times)


def times_in(text: object) -> float | None:
    """The number of "8x"; None of anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*x\s*", str(text), re.IGNORECASE)
    return None if match is None else float(match[1])


def parse_nbytes(text: int | str, what: str = "budget", also: str = "") -> int:
    """Bytes of "64MiB", "1.5 GB" or "4096 B", or of a number of them, above 0. Raises BudgetError.

    what: as the error calls it.  also: what else is allowed, behind the units in the error.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        text = f"{text}B"
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B|B)\s*", str(text), re.IGNORECASE)
    if not match:
        pairs = "KV pairs as 10000, or " if what == "budget" else ""
        raise BudgetError(f"{what} {text!r} is not an amount: give {pairs}bytes as 64MiB, 200MB or 4096B{also}")
    return int(float(match[1]) * UNITS[match[2].lower()])
