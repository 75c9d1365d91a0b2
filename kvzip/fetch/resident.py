"""The pairs of a layer that are in memory: what the last steps fetched from the file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from kvzip.context import RaggedLayer
from kvzip.ops.clusters import cluster_scores, rows_of_runs, take_clusters

BLOCK_QUERIES = 16  # queries whose pairs are in memory at the same time


@dataclass(frozen=True)
class FetchStats:
    """What was fetched, summed over layers.

    num_steps: forward passes.  num_pairs: pairs that they needed, counted once a pass where they fit in memory.
    num_hits: those that were in memory already.  nbytes: read from the file for the others.
    """

    num_steps: int = 0
    num_pairs: int = 0
    num_hits: int = 0
    nbytes: int = 0

    def __sub__(self, before: FetchStats) -> FetchStats:
        return FetchStats(*(getattr(self, f.name) - getattr(before, f.name) for f in fields(self)))


class Resident:
    """Fetches the pairs that queries need from a layer with clusters. Belongs to one session.

    What it returns does not depend on what it holds: pairs stand in the order of the layer.
    """

    def __init__(self, layer: RaggedLayer) -> None:
        assert layer.clusters is not None
        self.layer, self.index, self.stats = layer, layer.clusters, FetchStats()
        self._table = self.index.table(layer.offsets, layer.device)
        self._seen = torch.tensor([0, *self.index.num_seen(layer.seqlens)]).cumsum(0).int()
        self._recent: list[Tensor] = []  # rows of the layer that each of the last steps needed, ascending
        self._rows = torch.zeros(0, dtype=torch.int64)  # rows that are in memory, ascending
        self._keys, self._values = (pairs[:0] for pairs in layer.dense())

    @property
    def nbytes(self) -> int:
        """Bytes of the pairs in memory."""
        return self._keys.nbytes + self._values.nbytes

    def fetch(self, query: Tensor) -> Iterator[RaggedLayer]:
        """For each query [R, Hq, D] the pairs that it sees, on its device and in its dtype."""
        self.stats = replace(self.stats, num_steps=self.stats.num_steps + 1)
        for block in torch.split(query, BLOCK_QUERIES):
            wanted = self._select(block.to(self.layer.device))
            self._load(wanted[0] if len(wanted) == 1 else torch.unique(torch.cat(wanted)))
            for rows in wanted:
                yield self._layer_of(rows, query)
        if self.index.cache_steps == 0:
            self._hold(self._rows[:0])

    def _select(self, query: Tensor) -> list[Tensor]:
        """The rows of the layer that each query [R, Hq, D] sees, ascending."""
        scores = cluster_scores(query, self._table.centroids)
        scores = torch.nn.functional.pad(scores, (1, 0), value=torch.inf)  # sinks first
        taken = take_clusters(scores, self._table.sizes, self._table.budgets)
        return [rows_of_runs(self._table.starts, lengths) for lengths in taken]

    def _load(self, needed: Tensor) -> None:
        """Have the `needed` rows in memory, and those of the steps before that are to stay."""
        self._recent = [*self._recent, needed][-max(1, self.index.cache_steps) :]
        num_read = self._hold(needed if len(self._recent) == 1 else torch.unique(torch.cat(self._recent)))
        pair_nbytes = 2 * self.layer.head_dim * self.layer.dtype.itemsize
        self.stats = replace(
            self.stats,
            num_pairs=self.stats.num_pairs + len(needed),
            num_hits=self.stats.num_hits + len(needed) - num_read,
            nbytes=self.stats.nbytes + num_read * pair_nbytes,
        )

    def _hold(self, rows: Tensor) -> int:
        """Have just these rows in memory, those that are not yet read from the file; returns how many were."""
        at, found = self._find(rows)
        there, missing = found.nonzero().squeeze(1), (~found).nonzero().squeeze(1)
        held = []
        for old, pairs in zip((self._keys, self._values), self.layer.dense(), strict=True):
            new = torch.empty(len(rows), old.shape[1], dtype=old.dtype)
            new.index_copy_(0, there, old.index_select(0, at[there]))
            new.index_copy_(0, missing, pairs.index_select(0, rows[missing]))
            held.append(new)
        self._rows, (self._keys, self._values) = rows, held
        return len(missing)

    def _find(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Where rows stand among those in memory, and whether they do."""
        if not len(self._rows):
            return torch.zeros_like(rows), torch.zeros_like(rows, dtype=torch.bool)
        at = torch.searchsorted(self._rows, rows).clamp_max(len(self._rows) - 1)
        return at, self._rows[at] == rows

    def _layer_of(self, rows: Tensor, like: Tensor) -> RaggedLayer:
        bias = None if self.layer.bias is None else self.layer.bias[rows].to(like.device)
        at = slice(None) if len(rows) == len(self._rows) else self._find(rows)[0]
        keys, values = (pairs[at].to(like.device, like.dtype) for pairs in (self._keys, self._values))
        return RaggedLayer(keys, values, self._seen.to(like.device), None, bias)
