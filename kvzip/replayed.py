"""Queries of a replay, as many as fits need: what pairs that stay are fitted to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvzip.chunks import equal_parts
from kvzip.scorers.base import Observation, Observer, Shape

BLOCK_LEN = 512  # tokens that are fitted at a time: the cost of a fit grows with the square of it
ROWS = 2  # query rows of a KV head that are kept for each token of a chunk, at least
SHARE = 0.6  # of all query rows of a KV head, where that is more: a replay of many query heads pays for more of a fit


@dataclass(frozen=True)
class LayerQueries:
    """Queries of one full-attention layer while the context was repeated, and what they saw.

    query: [Hq, T, D], rotated, at their true positions, in 16 bits.  outputs: [Hq, T, D] in 16 bits and lse: [Hq, T]
    float32, over prefix, the chunk that each repeats, and the replayed tokens before it.  blocks: parts of the context,
    consecutive, all of it; none reaches beyond a chunk.  block_of, chunk_of: [T] int64, which of these each query
    repeats.  place_of: [T] int64, where each stood behind prefix and context, from 0 on.  scale, softcap: the model's
    own.
    """

    query: Tensor
    outputs: Tensor
    lse: Tensor
    block_of: Tensor
    chunk_of: Tensor
    place_of: Tensor
    blocks: Sequence[slice]
    scale: float
    softcap: float | None


class ReplayedQueries(Observer):
    """Keeps some of each chunk's query rows, evenly spread, and what they took.

    In 16 bits a row takes half as much as a pair of float32, so two a token take as much as the cache does. Of seven
    query heads a KV head 4.2 rows a token are kept.
    """

    needs = frozenset({"replay_queries"})

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self._seen: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in range(shape[0])]
        self._chunks: list[slice] = []
        self._places: list[Tensor] = []  # of each chunk
        self._scales: list[tuple[float, float | None]] = []

    def observe(self, layer: int, observation: Observation) -> None:
        num_heads, q_len, _ = observation.query.shape
        groups, chunk = num_heads // self.shape[1], observation.chunk
        count = min(q_len, math.ceil(max(ROWS / groups, SHARE) * (chunk.stop - chunk.start)))
        taken = torch.linspace(0, q_len - 1, count).long().to(observation.query.device)
        query, outputs = (_in_16_bits(rows[:, taken]) for rows in (observation.query, observation.outputs))
        self._seen[layer].append((query, outputs, observation.lse[:, taken]))
        if layer == 0:
            self._chunks.append(chunk)
            self._places.append(taken.cpu())
        if layer == len(self._scales):
            self._scales.append((observation.scale, observation.softcap))

    def of(self, layer: int) -> LayerQueries:
        """Those of a full-attention layer, counted among these alone."""
        query, outputs, lse = (torch.cat(parts, dim=1) for parts in zip(*self._seen[layer], strict=True))
        blocks, block_of, chunk_of = list[slice](), list[Tensor](), list[Tensor]()
        for number, (chunk, (part, *_)) in enumerate(zip(self._chunks, self._seen[layer], strict=True)):
            own, count = equal_parts(chunk, BLOCK_LEN), part.shape[1]
            # what repeats the first of so many equal parts comes first; the words that ask for the chunk are few
            block_of.append(len(blocks) + torch.arange(count) * len(own) // count)
            chunk_of.append(torch.full((count,), number))
            blocks += own
        scale, softcap = self._scales[layer]
        which = torch.cat(block_of), torch.cat(chunk_of), torch.cat(self._places)
        return LayerQueries(query, outputs, lse, *which, blocks, scale, softcap)


def _in_16_bits(rows: Tensor) -> Tensor:
    return rows.half() if rows.dtype == torch.float32 else rows.clone()
