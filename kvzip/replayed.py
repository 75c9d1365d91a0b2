"""Queries of a replay, as many as fits need: what pairs that stay are fitted to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvzip.scorers.base import Observation, Observer, Shape


@dataclass(frozen=True)
class LayerQueries:
    """Queries of one full-attention layer while the context was repeated.

    query: [Hq, T, D], rotated, at their true positions.  chunk_of: [T] int64, which of `chunks` each of them repeats.
    chunks: parts of the context, consecutive, all of it.  scale, softcap: the model's own.
    """

    query: Tensor
    chunk_of: Tensor
    chunks: Sequence[slice]
    scale: float
    softcap: float | None


class ReplayedQueries(Observer):
    """Keeps of each chunk as many query rows a KV head as the chunk has tokens, evenly spread.

    So they take half of what the chunk's keys and values do, whatever the model.
    """

    needs = frozenset({"replay_queries"})

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self._queries: list[list[Tensor]] = [[] for _ in range(shape[0])]
        self._chunks: list[slice] = []
        self._scales: list[tuple[float, float | None]] = []

    def observe(self, layer: int, observation: Observation) -> None:
        num_heads, q_len, _ = observation.query.shape
        groups, chunk = num_heads // self.shape[1], observation.chunk
        count = min(q_len, math.ceil((chunk.stop - chunk.start) / groups))
        taken = torch.linspace(0, q_len - 1, count).long().to(observation.query.device)
        self._queries[layer].append(observation.query[:, taken])
        if layer == 0:
            self._chunks.append(chunk)
        if layer == len(self._scales):
            self._scales.append((observation.scale, observation.softcap))

    def of(self, layer: int) -> LayerQueries:
        """Those of a full-attention layer, counted among these alone."""
        parts = self._queries[layer]
        counts = torch.tensor([part.shape[1] for part in parts])
        chunk_of = torch.arange(len(parts)).repeat_interleave(counts)
        return LayerQueries(torch.cat(parts, dim=1), chunk_of, self._chunks, *self._scales[layer])
