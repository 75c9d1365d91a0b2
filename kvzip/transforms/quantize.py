"""Keys and values in 8, 4 or 2 bits, each with its own grouping."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Literal

from torch import Tensor

from kvzip.context import RaggedLayer
from kvzip.ops.quantize import Axis, Layout, quantize
from kvzip.parts import Range
from kvzip.transforms.base import BaseTransform, Evicted, Which

Bits = Literal[16, 8, 4, 2]
UNCHANGED = 16


class Quantize(BaseTransform):
    """Each number in few bits, with a float16 scale and zero for each group (`kvzip.ops.quantize`).

    key_bits, value_bits: of a number; 16 leaves the numbers as they are.  key_axis, value_axis: whether neighbouring
    channels of a pair share a scale ("token") or neighbouring pairs of a head do, channel by channel ("channel"). Keys
    have channels that are large in every pair, so few bits want "channel".  group_size: numbers that share a scale; on
    the "token" axis the largest divisor of the head size up to it.  The prefix is quantized too; sliding windows are
    not.  Attention reads the codes block by block.
    """

    summary = "few bits a number, scales by group"
    source = "KIVI, arXiv 2402.02750; DiffKV, arXiv 2412.03131"
    stores_codes = True

    def __init__(
        self,
        *,
        key_bits: Bits = 4,
        value_bits: Bits = 4,
        key_axis: Axis = "channel",
        value_axis: Axis = "token",
        group_size: Annotated[int, Range(1, 1024)] = 64,
    ) -> None:
        self.parts: tuple[tuple[Bits, Axis], ...] = ((key_bits, key_axis), (value_bits, value_axis))
        self.group_size = group_size

    def apply(self, layer: RaggedLayer, evicted: Evicted | None = None) -> RaggedLayer:
        keys, values = (
            pairs if layout is None or not isinstance(pairs, Tensor) else quantize(pairs, layer.offsets, layout)
            for pairs, layout in zip((layer.keys, layer.values), self.layouts(layer.head_dim), strict=True)
        )
        return replace(layer, keys=keys, values=values)

    def read_back(self, which: Which, pairs: Tensor, scores: Tensor | None = None) -> Tensor:
        key_layout, value_layout = self.layouts(pairs.shape[1])
        layout = key_layout if which == "keys" else value_layout
        if layout is None or not len(pairs):
            return pairs
        return quantize(pairs, (0, len(pairs)), layout).read((0, len(pairs)), 0, 0, len(pairs))

    def layouts(self, head_dim: int) -> Iterator[Layout | None]:
        """Of the keys, then of the values; None where they stay as they are."""
        divisor = next(size for size in range(min(self.group_size, head_dim), 0, -1) if head_dim % size == 0)
        for bits, axis in self.parts:
            yield None if bits == UNCHANGED else Layout(bits, axis, divisor if axis == "token" else self.group_size)

    def pair_nbytes(self, head_dim: int, itemsize: int) -> float:
        return sum(
            head_dim * itemsize if layout is None else layout.pair_bits(head_dim) / 8
            for layout in self.layouts(head_dim)
        )

    def head_nbytes(self, head_dim: int) -> int:
        """Scales and zeros of a last group that is not full, of keys and of values."""
        return sum(4 * head_dim for layout in self.layouts(head_dim) if layout is not None and layout.axis == "channel")
