"""Queries of a replay, as many as fits need: what pairs that stay are fitted to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kvzip.scorers.base import Observation, Observer, Shape

BLOCK_LEN = 1024  # tokens that are fitted at a time: the cost of a fit grows with the square of it
ROWS = 2  # query rows of a KV head that are kept, for each token of a chunk: four were no better, one was worse


@dataclass(frozen=True)
class LayerQueries:
    """Queries of one full-attention layer while the context was repeated.

    query: [Hq, T, D], rotated, at their true positions, in 16 bits.  blocks: parts of the context, consecutive, all of
    it.  block_of: [T] int64, which of them each query repeats.  scale, softcap: the model's own.
    """

    query: Tensor
    block_of: Tensor
    blocks: Sequence[slice]
    scale: float
    softcap: float | None


class ReplayedQueries(Observer):
    """Keeps of each chunk twice as many query rows a KV head as the chunk has tokens, evenly spread, in 16 bits.

    So of a float32 model they take half of what the chunk's keys and values do, of a 16-bit one as much.
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
        count = min(q_len, math.ceil(ROWS * (chunk.stop - chunk.start) / groups))
        taken = torch.linspace(0, q_len - 1, count).long().to(observation.query.device)
        kept = observation.query[:, taken]
        self._queries[layer].append(kept.half() if kept.dtype == torch.float32 else kept)
        if layer == 0:
            self._chunks.append(chunk)
        if layer == len(self._scales):
            self._scales.append((observation.scale, observation.softcap))

    def of(self, layer: int) -> LayerQueries:
        """Those of a full-attention layer, counted among these alone."""
        parts, blocks, block_of = self._queries[layer], list[slice](), list[Tensor]()
        for chunk, part in zip(self._chunks, parts, strict=True):
            own = equal_parts(chunk, BLOCK_LEN)
            # what repeats the first of so many equal parts comes first; the words that ask for the chunk are few
            block_of.append(len(blocks) + torch.arange(part.shape[1]) * len(own) // part.shape[1])
            blocks += own
        return LayerQueries(torch.cat(parts, dim=1), torch.cat(block_of), blocks, *self._scales[layer])


def equal_parts(chunk: slice, most: int) -> list[slice]:
    """A chunk in as few equal parts as have at most that many tokens each; a token more or less."""
    total = chunk.stop - chunk.start
    count = math.ceil(total / most)
    bounds = [chunk.start + total * i // count for i in range(count + 1)]
    return [slice(*pair) for pair in pairwise(bounds)]
