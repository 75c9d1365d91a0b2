"""Chance: what every method should beat."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from kvzip.parts import Range
from kvzip.scorers.base import BaseScorer, Shape


class RandomScorer(BaseScorer):
    """Uniform random numbers in [0, 1), the same ones for the same shape and seed."""

    summary = "chance, the same for the same shape and seed"
    source = "a baseline of ours"

    def __init__(self, shape: Shape, *, seed: Annotated[int, Range(0)] = 0) -> None:
        super().__init__(shape)
        self.seed = seed

    def scores(self) -> Tensor:
        return torch.rand(self.shape, generator=torch.Generator().manual_seed(self.seed))
