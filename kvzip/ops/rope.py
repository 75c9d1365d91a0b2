"""Rotary position embedding as a rotation of keys that are already rotated."""

from __future__ import annotations

import torch
from torch import Tensor


def shift_keys(keys: Tensor, inv_freq: Tensor | None, offset: int) -> Tensor:
    """Keys as they would be had each token stood `offset` positions later (negative: earlier).

    keys: [..., D], rotated by the model with the half-split layout (dimension i turns with i + R/2, the layout of
    Llama, Qwen and Gemma in transformers); only the first R = 2 * len(inv_freq) dimensions turn.
    inv_freq: [R/2] radians a position, or None where the layer has no rotary embedding.
    The angle is computed in float64; the result has the dtype of `keys`.  Source: RoFormer (arXiv 2104.09864).
    """
    if inv_freq is None or offset == 0:
        return keys.clone()
    angle = inv_freq.double() * offset
    return turn(keys, angle.cos().to(keys.dtype), angle.sin().to(keys.dtype))


def turn_back(rows: Tensor, inv_freq: Tensor | None, positions: Tensor) -> Tensor:
    """Rows [..., T, D] that stood at `positions` [T], rotated, as they were before rotation."""
    if inv_freq is None:
        return rows
    cos, sin = angles(inv_freq, positions)
    return turn(rows, cos.to(rows.dtype), -sin.to(rows.dtype))


def angles(inv_freq: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, R/2] float64 of the rotations at `positions` [T]."""
    angle = positions.double().unsqueeze(-1) * inv_freq.double().to(positions.device)
    return angle.cos(), angle.sin()


def turn(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rows [..., D] with their first R dimensions turned in pairs (i, i + R/2).  cos, sin: broadcast to [..., R/2]."""
    half = cos.shape[-1]
    first, second = rows[..., :half], rows[..., half : 2 * half]
    turned = (first * cos - second * sin, second * cos + first * sin, rows[..., 2 * half :])
    return torch.cat(turned, dim=-1)
