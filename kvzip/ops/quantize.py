"""Keys and values in 8, 4 or 2 bits: codes, and float16 scales and zeros for each group of numbers.

A number x of a group stands as the code round((x - zero) / scale), and is read as zero + scale * code. zero is the
group's least number rounded down to float16, scale its range over the largest code rounded up: so no number is clipped,
and each is off by half a scale at most.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from kvzip.errors import InputError

Axis = Literal["token", "channel"]
AXES: tuple[Axis, ...] = ("token", "channel")
BITS = (8, 4, 2)


@dataclass(frozen=True)
class Layout:
    """How numbers are grouped.

    bits: 8, 4 or 2 a number.  axis: "token" = `group_size` neighbouring channels of a pair share a scale, "channel" =
    one channel of `group_size` neighbouring pairs of a head does (the last group of a head may be smaller).
    """

    bits: int
    axis: Axis
    group_size: int

    def check(self, head_dim: int) -> None:
        """Raises InputError where heads of that size can't be stored so."""
        if head_dim * self.bits % 8:
            raise InputError(f"{self.bits} bits a number don't fill bytes with a head size of {head_dim}: take 8 bits")
        if self.axis == "token" and head_dim % self.group_size:
            raise InputError(f"group_size {self.group_size} does not divide the head size {head_dim}: give a divisor")

    def num_groups(self, offsets: tuple[int, ...]) -> int:
        """Groups along the pairs of all heads, of the "channel" axis."""
        return sum(-(-(end - start) // self.group_size) for start, end in pairwise(offsets))

    def scales_shape(self, offsets: tuple[int, ...], head_dim: int) -> tuple[int, int]:
        """The shape of scales, and of zeros."""
        if self.axis == "token":
            return offsets[-1], head_dim // self.group_size
        return self.num_groups(offsets), head_dim

    def pair_bits(self, head_dim: int) -> float:
        """Bits that one of the two vectors of a pair takes, scales and zeros counted, in groups that are full."""
        return head_dim * (self.bits + 32 / self.group_size)


@dataclass(frozen=True, eq=False)
class QuantizedPairs:
    """The keys, or the values, of one layer.

    codes: [N, D * bits / 8] uint8; byte j of a row holds elements j, j + W, ... of its W bytes, lowest bits first.
    scales, zeros: float16, [N, D / group_size] of the "token" axis, [groups, D] of the "channel" axis, groups of one
    head after those of another.  dtype: what they are read as.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    layout: Layout
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D), as of the numbers that these stand for."""
        return self.codes.shape[0], self.codes.shape[1] * 8 // self.layout.bits

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zeros."""
        return self.codes.nbytes + self.scales.nbytes + self.zeros.nbytes

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> QuantizedPairs:
        """The same on another device, read as `dtype`."""
        codes, scales, zeros = (t.to(device) for t in (self.codes, self.scales, self.zeros))
        return replace(self, codes=codes, scales=scales, zeros=zeros, dtype=dtype or self.dtype)

    def heads(self, offsets: tuple[int, ...], start: int, stop: int) -> QuantizedPairs:
        """The pairs of heads `start` to `stop` alone; views.  offsets: where each head of the layer begins and ends."""
        rows = slice(offsets[start], offsets[stop])
        groups = rows
        if self.layout.axis == "channel":
            groups = slice(*(self.layout.num_groups(offsets[: head + 1]) for head in (start, stop)))
        return replace(self, codes=self.codes[rows], scales=self.scales[groups], zeros=self.zeros[groups])

    def read(self, offsets: tuple[int, ...], head: int, start: int, stop: int) -> Tensor:
        """Pairs `start` to `stop` of a head, counted from its first: [stop - start, D] of `dtype`."""
        rows = slice(offsets[head] + start, offsets[head] + stop)
        numbers = unpack_codes(self.codes[rows], self.layout.bits).float()
        if self.layout.axis == "token":
            groups = numbers.reshape(len(numbers), self.scales.shape[1], self.layout.group_size)
            scales, zeros = (t[rows].float().unsqueeze(2) for t in (self.scales, self.zeros))
            return (groups * scales + zeros).flatten(1).to(self.dtype)
        first = self.layout.num_groups(offsets[: head + 1])
        group = first + torch.arange(start, stop, device=self.device) // self.layout.group_size
        return (numbers * self.scales[group].float() + self.zeros[group].float()).to(self.dtype)


def quantize(pairs: Tensor, offsets: tuple[int, ...], layout: Layout) -> QuantizedPairs:
    """Keys or values [N, D] of one layer in codes.  offsets: where each head begins and ends.

    Raises InputError where the layout does not fit, or a number is beyond float16.
    """
    layout.check(pairs.shape[1])
    numbers = pairs.float()
    low, high = (reduce(numbers, offsets, layout) for reduce in (_least, _largest))
    zeros = _half_below(low)
    largest_code = 2**layout.bits - 1
    scales = _half_above((high - zeros.float()) / largest_code)
    if not bool(scales.isfinite().all() & zeros.isfinite().all()):
        raise InputError("a key or value is beyond the range of float16: leave the pairs in the model's dtype")
    found = QuantizedPairs(numbers.new_empty(0, dtype=torch.uint8), scales, zeros, layout, pairs.dtype)
    every_scale, every_zero = (_spread(t.float(), offsets, layout, pairs.shape) for t in (scales, zeros))
    codes = ((numbers - every_zero) / every_scale.clamp_min(torch.finfo(torch.float32).tiny)).round_()
    return replace(found, codes=pack_codes(codes.clamp_(0, largest_code).to(torch.uint8), layout.bits))


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes [N, D] uint8 below 2^bits as bytes [N, D * bits / 8]; see `QuantizedPairs`."""
    parts = codes.reshape(len(codes), 8 // bits, codes.shape[1] * bits // 8)
    packed = parts[:, 0].clone()
    for index in range(1, 8 // bits):
        packed |= parts[:, index] << (bits * index)
    return packed


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_codes`."""
    return torch.cat([packed >> shift & (2**bits - 1) for shift in range(0, 8, bits)], dim=1)


def _least(numbers: Tensor, offsets: tuple[int, ...], layout: Layout) -> Tensor:
    return _grouped(numbers, offsets, layout, torch.inf).amin(dim=-1)


def _largest(numbers: Tensor, offsets: tuple[int, ...], layout: Layout) -> Tensor:
    return _grouped(numbers, offsets, layout, -torch.inf).amax(dim=-1)


def _grouped(numbers: Tensor, offsets: tuple[int, ...], layout: Layout, fill: float) -> Tensor:
    """[*scales_shape, group_size]; groups that are not full hold `fill`."""
    if layout.axis == "token":
        return numbers.reshape(len(numbers), numbers.shape[1] // layout.group_size, layout.group_size)
    padded = numbers.new_full((layout.num_groups(offsets) * layout.group_size, numbers.shape[1]), fill)
    padded[_padded_rows(offsets, layout)] = numbers
    return padded.reshape(-1, layout.group_size, numbers.shape[1]).transpose(1, 2)


def _padded_rows(offsets: tuple[int, ...], layout: Layout) -> Tensor:
    """Where each pair would stand if all groups were full: [N]."""
    firsts = [layout.num_groups(offsets[: head + 1]) * layout.group_size for head in range(len(offsets) - 1)]
    seqlens = zip(firsts, offsets, offsets[1:], strict=False)
    return torch.cat([torch.arange(first, first + end - start) for first, start, end in seqlens])


def _spread(groups: Tensor, offsets: tuple[int, ...], layout: Layout, shape: torch.Size) -> Tensor:
    """What each number's group has: [N, D]."""
    if layout.axis == "token":
        return groups.repeat_interleave(layout.group_size, dim=1)
    return groups[_padded_rows(offsets, layout).to(groups.device) // layout.group_size].reshape(shape)


def _half_below(numbers: Tensor) -> Tensor:
    """The largest float16 that is not above each number."""
    half = numbers.half()
    bits = half.view(torch.int16)
    lower = torch.where(bits > 0, bits - 1, torch.where(bits == 0, torch.full_like(bits, -(2**15) + 1), bits + 1))
    return torch.where(half.float() > numbers, lower, bits).view(torch.float16)


def _half_above(numbers: Tensor) -> Tensor:
    """The least float16 that is not below each number; these are not negative."""
    bits = numbers.half().view(torch.int16)
    return torch.where(numbers.half().float() < numbers, bits + 1, bits).view(torch.float16)
