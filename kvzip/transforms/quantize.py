"""Keys and values in 8, 4 or 2 bits, each with its own grouping."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Literal

import torch
from torch import Tensor

from kvzip.context import RaggedLayer
from kvzip.ops.quantize import Axis, Layout, quantize
from kvzip.parts import Range
from kvzip.transforms.base import BaseTransform, Evicted, Rows

Bits = Literal[16, 8, 6, 5, 4, 3, 2]
Channels = Literal["equal", "mixed"]
Values = Literal["plain", "rotated"]
UNCHANGED = 16


class Quantize(BaseTransform):
    """Each number in few bits, with a float16 scale and zero for each group (`kvzip.ops.quantize`).

    key_bits, value_bits: of a number; 16 leaves the numbers as they are. key_axis, value_axis: whether neighbouring
    channels of a pair share a scale ("token") or neighbouring pairs of a head do, channel by channel ("channel").
    Keys have channels that are large in every pair, so few bits want "channel". group_size: numbers that share a
    scale; on the "token" axis the largest divisor of the head size up to it. prefix_key_bits, prefix_value_bits: of
    the prefix's, along "token", where that is more: the sinks there draw most of the attention, and their keys
    would widen the scales of their neighbours. channels: "mixed" gives each channel of a head its own number of
    bits, as many on average, where scales are shared along "channel": of keys more to those where an error moves
    the logits of replayed queries most. values: "rotated" stores them times a Hadamard matrix, whose numbers are
    more alike. Sliding windows are not quantized. Attention reads the codes block by block.
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
        prefix_key_bits: Bits = 8,
        prefix_value_bits: Bits = 4,
        channels: Channels = "equal",
        values: Values = "plain",
    ) -> None:
        self.has_rotated_values = values == "rotated"
        self.is_mixed = self.needs_queries = channels == "mixed"
        self.parts: tuple[tuple[Bits, Axis], ...] = ((key_bits, key_axis), (value_bits, value_axis))
        self.group_size = group_size
        self.prefix = None
        more = max(prefix_key_bits, key_bits), max(prefix_value_bits, value_bits)
        if more != (key_bits, value_bits):
            self.prefix = Quantize(
                key_bits=more[0], value_bits=more[1], key_axis="token", value_axis="token", group_size=group_size,
                prefix_key_bits=more[0], prefix_value_bits=more[1], values=values,
            )  # fmt: skip

    def apply(self, layer: RaggedLayer, evicted: Evicted | None = None) -> RaggedLayer:
        importance = None
        if self.is_mixed and evicted is not None and evicted.queries is not None:
            importance = evicted.key_importance
        if evicted is None or self.prefix is None or not evicted.prefix_len:
            return self._coded(layer, importance)
        is_prefix = torch.zeros(layer.offsets[-1], dtype=torch.bool, device=layer.device)
        for start in layer.offsets[:-1]:
            is_prefix[start : start + evicted.prefix_len] = True
        prefix, rest = self.prefix._coded(layer.part(is_prefix)), layer.part(~is_prefix)
        return replace(prefix, lower=self._coded(rest, importance)) if rest.offsets[-1] else prefix

    def _coded(self, layer: RaggedLayer, key_importance: Tensor | None = None) -> RaggedLayer:
        """All pairs alike.  key_importance: [Hkv, D], or None = the same for all."""
        stored = zip((layer.keys, layer.values), self.layouts(layer.head_dim), (key_importance, None), strict=True)
        keys, values = (
            pairs if layout is None or not isinstance(pairs, Tensor) else quantize(pairs, layer.offsets, layout, own)
            for pairs, layout, own in stored
        )
        return replace(layer, keys=keys, values=values)

    def read_back(self, rows: Rows) -> Tensor:
        numbers, count = rows.numbers, rows.prefix_len
        if count and self.prefix is not None:
            rest = self.read_back(replace(rows, numbers=numbers[count:], prefix_len=0))
            return torch.cat([self.prefix.read_back(Rows(rows.which, numbers[:count])), rest])
        key_layout, value_layout = self.layouts(numbers.shape[1])
        layout = key_layout if rows.which == "keys" else value_layout
        if layout is None or not len(numbers):
            return numbers
        own = None if rows.importance is None else rows.importance.unsqueeze(0)
        return quantize(numbers, (0, len(numbers)), layout, own).read((0, len(numbers)), 0, 0, len(numbers))

    def layouts(self, head_dim: int) -> Iterator[Layout | None]:
        """Of the keys, then of the values; None where they stay as they are."""
        divisor = next(size for size in range(min(self.group_size, head_dim), 0, -1) if head_dim % size == 0)
        for (bits, axis), rotated in zip(self.parts, (False, self.has_rotated_values), strict=True):
            size, is_mixed = divisor if axis == "token" else self.group_size, self.is_mixed and axis == "channel"
            yield None if bits == UNCHANGED else Layout(bits, axis, size, is_mixed, rotated)

    def pair_nbytes(self, head_dim: int, itemsize: int) -> float:
        return sum(
            head_dim * itemsize if layout is None else layout.pair_bits(head_dim) / 8
            for layout in self.layouts(head_dim)
        )

    def prefix_pair_nbytes(self, head_dim: int, itemsize: int) -> float:
        return (self.prefix or self).pair_nbytes(head_dim, itemsize)

    def head_nbytes(self, head_dim: int) -> int:
        """Scales and zeros of a last group that is not full, and bits by channel, of keys and of values; an offset of a
        second level."""
        layouts = [layout for layout in self.layouts(head_dim) if layout is not None and layout.axis == "channel"]
        ends = sum((4 + layout.mixed) * head_dim for layout in layouts)
        return ends + (8 if self.prefix is not None else 0)
