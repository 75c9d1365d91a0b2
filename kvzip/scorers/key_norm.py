"""Keys with a small norm attract attention (arXiv 2406.11430)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvzip.scorers.base import Observation


class KeyNormScorer:
    """A pair's score is minus the L2 norm of its key; a rotary embedding does not change it."""

    needs = frozenset({"keys"})

    def __init__(self, num_layers: int, num_kv_heads: int, context_len: int) -> None:
        self._scores = torch.zeros(num_layers, num_kv_heads, context_len)

    def observe(self, layer: int, observation: Observation) -> None:
        """Nothing of a replay is needed."""

    def read(self, layer: int, keys: Tensor, values: Tensor) -> None:
        self._scores[layer] = -torch.linalg.vector_norm(keys.float(), dim=-1).cpu()

    def scores(self) -> Tensor:
        return self._scores
