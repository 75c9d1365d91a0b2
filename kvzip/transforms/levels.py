"""Two precisions in one context: more bits for the pairs that score high (LeanKV, arXiv 2412.03131)."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from torch import Tensor

from kvzip.context import RaggedLayer
from kvzip.ops.quantize import Axis
from kvzip.ops.selection import PINNED
from kvzip.parts import Range
from kvzip.transforms.base import BaseTransform, Evicted, Rows
from kvzip.transforms.quantize import Bits, Quantize


class Levels(BaseTransform):
    """Of the pairs that stay, those that score more than `high` are stored in more bits than the others.

    high: on the scale of the scorer. The prefix and pairs that are pinned are always high.  high_key_bits, ...: bits of
    a number; 16 leaves the numbers as they are.  key_axis, group_size: as of `Quantize`, by default one scale a vector.
    Values share scales along "token". Both levels are made of the numbers themselves, not one of the other.
    """

    summary = "more bits for pairs that score high, fewer for the others that stay"
    source = "LeanKV, arXiv 2412.03131"
    stores_codes = True
    needs_scores = True

    def __init__(
        self,
        *,
        high: float = 1.0,
        high_key_bits: Bits = 8,
        high_value_bits: Bits = 4,
        low_key_bits: Bits = 4,
        low_value_bits: Bits = 2,
        key_axis: Axis = "token",
        group_size: Annotated[int, Range(1, 1024)] = 1024,
    ) -> None:
        self.threshold = high
        self.high, self.low = (
            Quantize(key_bits=keys, value_bits=values, key_axis=key_axis, group_size=group_size)
            for keys, values in ((high_key_bits, high_value_bits), (low_key_bits, low_value_bits))
        )

    def apply(self, layer: RaggedLayer, evicted: Evicted) -> RaggedLayer:
        scores = evicted.scores
        assert scores is not None
        is_high = self._is_high(scores).to(layer.device)
        high, low = layer.part(is_high), layer.part(~is_high)
        if not low.offsets[-1]:
            return self.high.apply(high)
        if not high.offsets[-1]:
            return self.low.apply(low)
        return replace(self.high.apply(high), lower=self.low.apply(low))

    def read_back(self, rows: Rows) -> Tensor:
        assert rows.scores is not None
        found, is_high = rows.numbers.clone(), self._is_high(rows.scores).to(rows.numbers.device)
        for level, chosen in ((self.high, is_high), (self.low, ~is_high)):
            found[chosen] = level.read_back(Rows(rows.which, rows.numbers[chosen]))
        return found

    def _is_high(self, scores: Tensor) -> Tensor:
        return (scores > self.threshold) | (scores >= PINNED)

    def pair_nbytes(self, head_dim: int, itemsize: int) -> float:
        """Of a pair in the level that takes more."""
        return max(level.pair_nbytes(head_dim, itemsize) for level in (self.high, self.low))

    def head_nbytes(self, head_dim: int) -> int:
        return self.high.head_nbytes(head_dim) + self.low.head_nbytes(head_dim) + 4
