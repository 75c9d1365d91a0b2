"""Scorers that a method should beat: chance, and position alone."""

from __future__ import annotations

import torch
from torch import Tensor

from kvzip.scorers.base import Observation

NUM_SINKS = 4


class RandomScorer:
    """Uniform random numbers, the same ones for the same shape."""

    needs: frozenset[str] = frozenset()

    def __init__(self, num_layers: int, num_kv_heads: int, context_len: int) -> None:
        self.shape = (num_layers, num_kv_heads, context_len)

    def observe(self, layer: int, observation: Observation) -> None:
        """Nothing is needed."""

    def read(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Nothing is needed."""

    def scores(self) -> Tensor:
        return torch.rand(self.shape, generator=torch.Generator().manual_seed(0))


class SinksRecentScorer(RandomScorer):
    """The first tokens and the last ones (StreamingLLM, arXiv 2309.17453): the later, the higher; sinks highest."""

    def scores(self) -> Tensor:
        context_len = self.shape[2]
        by_position = torch.arange(context_len, dtype=torch.float32) / max(1, context_len)
        by_position[:NUM_SINKS] = 1.0
        return by_position.expand(self.shape).contiguous()
