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
    cos, sin = angle.cos().to(keys.dtype), angle.sin().to(keys.dtype)
    half = inv_freq.numel()
    first, second = keys[..., :half], keys[..., half : 2 * half]
    turned = (first * cos - second * sin, second * cos + first * sin, keys[..., 2 * half :])
    return torch.cat(turned, dim=-1)
