"""Keys with a small norm attract attention (arXiv 2406.11430)."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from kvzip.errors import InputError
from kvzip.ops.selection import PINNED
from kvzip.parts import Range
from kvzip.scorers.base import BaseScorer, Shape


class KeyNormScorer(BaseScorer):
    """A pair's score is minus the L2 norm of its key; a rotary embedding does not change it.

    skip_layers: full-attention layers, counted from 0, that keep all their pairs; the others share what remains of the
    budget. The paper skips the first two; its code skips none unless told.
    """

    needs = frozenset({"keys"})
    summary = "a small norm of the key"
    source = "L2-norm, arXiv 2406.11430"

    def __init__(self, shape: Shape, *, skip_layers: Annotated[tuple[int, ...], Range(0)] = ()) -> None:
        super().__init__(shape)
        if bad := [layer for layer in skip_layers if layer >= shape[0]]:
            raise InputError(
                f"skip_layers {bad[0]} is out of range: this model has full-attention layers 0 to {shape[0] - 1}"
            )
        self.skip_layers = skip_layers

    def read(self, layer: int, keys: Tensor, values: Tensor) -> None:
        self._scores[layer] = -torch.linalg.vector_norm(keys.float(), dim=-1).cpu()
        if layer in self.skip_layers:
            self._scores[layer] = PINNED
