"""Keys and values in few bits: codes, and float16 scales and zeros for each group of numbers.

A number x of a group stands as the code round((x - zero) / scale), and is read as zero + scale * code. zero is the
group's least number rounded down to float16, scale its range over the largest code rounded up: so no number is clipped,
and each is off by half a scale at most. Mixed codes give each channel of a head its own number of bits; there the range
of a group is narrowed where that makes the squared error less. Rotated codes are of a pair's vector times a Hadamard
matrix, whose numbers are more alike, so that a scale along the pair is smaller (QuaRot, arXiv 2404.00456).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from kvzip.errors import InputError

Axis = Literal["token", "channel"]
AXES: tuple[Axis, ...] = ("token", "channel")
BITS = (8, 6, 5, 4, 3, 2)
MAX_BITS = 8
SHRINKS = (1.0, 0.85, 0.7, 0.55, 0.4)  # of a group's range, of which the best is taken where codes are mixed
STREAM_ROWS = 4096  # rows whose bits are spread out at a time
STREAM_STEP = 8  # channels that a kernel takes out of a string of bits at a time


@dataclass(frozen=True)
class Layout:
    """How numbers are grouped.

    bits: 8, 6, 5, 4, 3 or 2 a number.  axis: "token" = `group_size` neighbouring channels of a pair share a scale,
    "channel" = one channel of `group_size` neighbouring pairs of a head does (the last group of a head may be smaller).
    mixed: `bits` is a mean, and each channel of a head has its own number of them; on the "channel" axis.
    rotated: codes are of the vectors times a Hadamard matrix, of the largest size of a power of 2 that divides the head
    size; a longer vector is cut into parts of that size.
    """

    bits: int
    axis: Axis
    group_size: int
    mixed: bool = False
    rotated: bool = False

    @property
    def is_stream(self) -> bool:
        """Whether a row is a string of bits, rather than equal parts of its bytes."""
        return self.mixed or 8 % self.bits != 0

    def check(self, head_dim: int) -> None:
        """Raises InputError where heads of that size can't be stored so."""
        if head_dim * self.bits % 8:
            raise InputError(f"{self.bits} bits a number don't fill bytes with a head size of {head_dim}: take 8 bits")
        if self.axis == "token" and head_dim % self.group_size:
            raise InputError(f"group_size {self.group_size} does not divide the head size {head_dim}: give a divisor")
        if self.mixed and self.axis == "token":
            raise InputError("channels can't have bits of their own where they share a scale: take the axis 'channel'")
        if self.is_stream and head_dim % STREAM_STEP:
            raise InputError(f"a head size of {head_dim} does not go with mixed codes or {self.bits} bits: take 8 bits")
        if self.is_stream and self.axis == "token" and self.group_size % STREAM_STEP:
            raise InputError(f"group_size {self.group_size} does not go with {self.bits} bits: give a multiple of 8")

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

    codes: [N, D * bits / 8] uint8. In 8, 4 and 2 bits that are not mixed, byte j of a row holds elements j, j + W, ...
    of its W bytes, lowest bits first; otherwise the bits of a row, lowest first, hold one element after another.
    scales, zeros: float16, [N, D / group_size] of the "token" axis, [groups, D] of the "channel" axis, groups of one
    head after those of another.  dtype: what they are read as.
    widths: [Hkv, D] uint8, the bits of each channel, 0 to 8, their mean over a head being `bits`; None where not mixed.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    layout: Layout
    dtype: torch.dtype
    widths: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D), as of the numbers that these stand for."""
        return self.codes.shape[0], self.codes.shape[1] * 8 // self.layout.bits

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, zeros and widths."""
        widths = 0 if self.widths is None else self.widths.nbytes
        return self.codes.nbytes + self.scales.nbytes + self.zeros.nbytes + widths

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> QuantizedPairs:
        """The same on another device, read as `dtype`."""
        codes, scales, zeros = (t.to(device) for t in (self.codes, self.scales, self.zeros))
        widths = None if self.widths is None else self.widths.to(device)
        return QuantizedPairs(codes, scales, zeros, self.layout, dtype or self.dtype, widths)

    def heads(self, offsets: tuple[int, ...], start: int, stop: int) -> QuantizedPairs:
        """The pairs of heads `start` to `stop` alone; views.  offsets: where each head of the layer begins and ends."""
        rows = slice(offsets[start], offsets[stop])
        groups = rows
        if self.layout.axis == "channel":
            groups = slice(*(self.layout.num_groups(offsets[: head + 1]) for head in (start, stop)))
        widths = None if self.widths is None else self.widths[start:stop]
        return replace(
            self, codes=self.codes[rows], scales=self.scales[groups], zeros=self.zeros[groups], widths=widths
        )

    def read(self, offsets: tuple[int, ...], head: int, start: int, stop: int) -> Tensor:
        """Pairs `start` to `stop` of a head, counted from its first: [stop - start, D] of `dtype`."""
        rows = slice(offsets[head] + start, offsets[head] + stop)
        numbers = self._unpacked(rows, head).float()
        if self.layout.axis == "token":
            groups = numbers.reshape(len(numbers), self.scales.shape[1], self.layout.group_size)
            scales, zeros = (t[rows].float().unsqueeze(2) for t in (self.scales, self.zeros))
            found = (groups * scales + zeros).flatten(1)
        else:
            first = self.layout.num_groups(offsets[: head + 1])
            group = first + torch.arange(start, stop, device=self.device) // self.layout.group_size
            found = numbers * self.scales[group].float() + self.zeros[group].float()
        return (_rotated(found) if self.layout.rotated else found).to(self.dtype)

    def _unpacked(self, rows: slice, head: int) -> Tensor:
        """The codes of these rows, all of one head: [n, D] uint8."""
        if not self.layout.is_stream:
            return unpack_codes(self.codes[rows], self.layout.bits)
        return unpack_stream(self.codes[rows], self.all_widths(head + 1)[head])

    def all_widths(self, num_heads: int) -> Tensor:
        """Bits of each channel of each head, as of `widths`, mixed or not: [num_heads, D] uint8."""
        return _equal_widths(self, num_heads, self.layout.bits) if self.widths is None else self.widths


def _equal_widths(pairs: Tensor | QuantizedPairs, num_heads: int, bits: int) -> Tensor:
    return torch.full((num_heads, pairs.shape[1]), bits, dtype=torch.uint8, device=pairs.device)


def quantize(
    pairs: Tensor, offsets: tuple[int, ...], layout: Layout, importance: Tensor | None = None
) -> QuantizedPairs:
    """Keys or values [N, D] of one layer in codes.  offsets: where each head begins and ends.

    importance: [Hkv, D] of the squared error of each channel, for a mixed layout; None = the same for all.
    Raises InputError where the layout does not fit, or a number is beyond float16.
    """
    layout.check(pairs.shape[1])
    numbers, widths = _rotated(pairs.float()) if layout.rotated else pairs.float(), None
    low, high = (reduce(numbers, offsets, layout) for reduce in (_least, _largest))
    if layout.mixed:
        groups = _grouped(numbers, offsets, layout, torch.nan)
        counts = [layout.num_groups(ends) for ends in pairwise(offsets)]
        variances = _variances(groups, counts)
        widths = allot(variances if importance is None else importance * variances, layout.bits)
        most = 2.0 ** widths.repeat_interleave(torch.tensor(counts, device=widths.device), dim=0) - 1
        scales, zeros = _narrowed(groups, low, high, most)
    else:
        most = torch.full_like(low, 2**layout.bits - 1)
        zeros = _half_below(low)
        scales = _half_above((high - zeros.float()) / most)
    if not bool(scales.isfinite().all() & zeros.isfinite().all()):
        raise InputError("a key or value is beyond the range of float16: leave the pairs in the model's dtype")
    every = (_spread(t.float(), offsets, layout, pairs.shape) for t in (scales, zeros, most))
    codes = _codes(numbers, *every).to(torch.uint8)
    if layout.is_stream:
        every_width = _equal_widths(codes, len(offsets) - 1, layout.bits) if widths is None else widths
        heads = zip(pairwise(offsets), every_width, strict=True)
        packed = torch.cat([pack_stream(codes[first:end], own) for (first, end), own in heads])
    else:
        packed = pack_codes(codes, layout.bits)
    return QuantizedPairs(packed, scales, zeros, layout, pairs.dtype, widths)


@lru_cache(maxsize=4)
def hadamard_matrix(size: int) -> Tensor:
    """[size, size] float32 on the CPU, +-1 / sqrt(size), by Sylvester's construction; it is its own inverse."""
    index = torch.arange(size)
    signs = torch.zeros(size, size, dtype=torch.int64)
    for bit in range(size.bit_length()):  # of i and j, how many bits are set in both
        signs += (index[:, None] & index[None, :]) >> bit & 1
    return (1 - 2 * (signs % 2)).float() / size**0.5


def _rotated(numbers: Tensor) -> Tensor:
    """Vectors [N, D] float32, or parts of them, times the matrix, and back."""
    size = numbers.shape[1] & -numbers.shape[1]
    return (numbers.reshape(-1, size) @ hadamard_matrix(size).to(numbers.device)).view(numbers.shape)


def allot(importance: Tensor, bits: int) -> Tensor:
    """How many bits each channel [Hkv, D] is given, 0 to 8, `bits` on average in each head: [Hkv, D] uint8.

    importance: of what each channel would be off by without any bits, squared. A further bit makes that a fourth; so
    bits go one after another to where most is left (reverse water-filling; Cover and Thomas, section 10.3). Ties to the
    lower channel.
    """
    left = importance.double().unsqueeze(2) * 0.25 ** torch.arange(MAX_BITS, device=importance.device)
    order = left.flatten(1).argsort(dim=1, descending=True, stable=True)[:, : bits * importance.shape[1]]
    taken = torch.zeros_like(left.flatten(1), dtype=torch.uint8).scatter_(1, order, 1)
    return taken.view(left.shape).sum(dim=2, dtype=torch.uint8)


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


def pack_stream(codes: Tensor, widths: Tensor) -> Tensor:
    """Codes [N, D] uint8 of one head as bytes [N, sum(widths) / 8], one after another, the lowest bit first.

    widths: [D], the bits of each; the codes are below 2^width.
    """
    widths = widths.long()
    channel = torch.arange(len(widths), device=codes.device).repeat_interleave(widths)
    shift = torch.arange(len(channel), device=codes.device) - (widths.cumsum(0) - widths)[channel]
    place = 2 ** torch.arange(8, dtype=torch.uint8, device=codes.device)
    found = codes.new_empty(len(codes), len(channel) // 8)
    for start in range(0, len(codes), STREAM_ROWS):
        rows = slice(start, start + STREAM_ROWS)
        bits = codes[rows][:, channel] >> shift.to(torch.uint8) & 1
        found[rows] = (bits.view(len(bits), found.shape[1], 8) * place).sum(dim=2, dtype=torch.uint8)
    return found


def unpack_stream(packed: Tensor, widths: Tensor) -> Tensor:
    """The inverse of `pack_stream`."""
    widths = widths.long()
    first = widths.cumsum(0) - widths
    padded = torch.nn.functional.pad(packed, (0, 2)).int()  # so that each element lies in two bytes
    both = padded[:, first // 8] | padded[:, first // 8 + 1] << 8
    return (both >> (first % 8) & (2**widths - 1)).to(torch.uint8)


def _codes(numbers: Tensor, scales: Tensor, zeros: Tensor, most: Tensor) -> Tensor:
    """The codes of numbers, 0 to `most`, as floats; all of one shape or broadcast."""
    codes = ((numbers - zeros) / scales.clamp_min(torch.finfo(torch.float32).tiny)).round_()
    return torch.minimum(codes.clamp_min_(0), most)


def _variances(groups: Tensor, counts: list[int]) -> Tensor:
    """Of each channel of each head within its groups: [Hkv, D].  counts: groups of each head."""
    squares = (groups - groups.nanmean(dim=2, keepdim=True)).square().nansum(dim=2)
    return torch.stack([own.sum(dim=0) for own in torch.split(squares, counts)])


def _narrowed(groups: Tensor, low: Tensor, high: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and zeros, float16 [groups, D] as low and high, the ends of each range, and its largest code are.

    A range is narrowed around its middle by the factor of SHRINKS with which the squared error is least.
    """
    middle = torch.where(most > 0, (low + high) / 2, groups.nanmean(dim=2))
    best = torch.full_like(low, torch.inf)
    scales = zeros = torch.zeros_like(low, dtype=torch.float16)
    for shrink in SHRINKS:
        half = torch.where(most > 0, (high - low) / 2 * shrink, 0)
        zero = (middle - half).half()
        scale = (2 * half / most.clamp_min(1)).half()
        wide = scale.float().unsqueeze(2), zero.float().unsqueeze(2)
        off = (wide[1] + wide[0] * _codes(groups, *wide, most.unsqueeze(2)) - groups).square().nansum(dim=2)
        is_less = off < best
        best = torch.where(is_less, off, best)
        scales, zeros = torch.where(is_less, scale, scales), torch.where(is_less, zero, zeros)
    return scales, zeros


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
