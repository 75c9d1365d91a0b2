"""Packed storage: one [N, D] tensor a layer, one segment a KV head."""

from __future__ import annotations

import torch
from torch import Tensor


def cu_seqlens_of(keep_mask: Tensor) -> Tensor:
    """Exclusive prefix sum of the kept counts: [Hkv, S] bool -> [Hkv + 1] int32, first 0, last N."""
    counts = keep_mask.sum(dim=-1, dtype=torch.int32)
    return torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))


def pack(pairs: Tensor, keep_mask: Tensor) -> Tensor:
    """The kept rows, head after head, positions ascending: [Hkv, S, D] and [Hkv, S] bool -> [N, D]."""
    return pairs[keep_mask]


def unpack(packed: Tensor, keep_mask: Tensor, fill: float = 0.0) -> Tensor:
    """The inverse of `pack`: [N, D] and [Hkv, S] bool -> [Hkv, S, D], evicted rows hold `fill`."""
    full = packed.new_full((*keep_mask.shape, packed.shape[-1]), fill)
    full[keep_mask] = packed
    return full


def pack_bits(mask: Tensor) -> Tensor:
    """A bool tensor of any shape as uint8, eight entries a byte, lowest bit first, padded with zeros."""
    flat = mask.flatten()
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).reshape(-1, 8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    return (padded * weights).sum(dim=1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack_bits` for a mask of that shape."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    flat = (bits.unsqueeze(1) >> shifts & 1).bool().flatten()
    return flat[: torch.Size(shape).numel()].reshape(shape)
