"""What is known of the clusters of a layer: as it is stored, and as it is used."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ClusterIndex:
    """The clusters of a layer whose pairs stay in a file; each step fetches those that its queries need.

    The pairs of a head stand in this order: its sinks, which every query sees, then cluster after cluster.
    centroids: [C, D] float32, the mean key of each cluster, clusters sorted by KV head.  sizes: [C] int32, at least 1.
    cu_clusters: [Hkv + 1] int32, where the clusters of each head begin and end.
    budget: pairs besides the sinks that a query sees in each head.  cache_steps: steps for which pairs stay in memory.
    """

    centroids: Tensor
    sizes: Tensor
    cu_clusters: Tensor
    budget: int
    cache_steps: int

    @property
    def nbytes(self) -> int:
        return self.centroids.nbytes + self.sizes.nbytes + self.cu_clusters.nbytes

    @cached_property
    def num_clustered(self) -> list[int]:
        """Pairs of each head that stand in clusters."""
        bounds = self.cu_clusters.tolist()
        return [int(self.sizes[a:b].sum()) for a, b in pairwise(bounds)]

    def num_seen(self, seqlens: list[int]) -> list[int]:
        """Pairs of each head that one query sees.  seqlens: pairs that the heads hold."""
        return [n - max(0, held - self.budget) for n, held in zip(seqlens, self.num_clustered, strict=True)]

    def table(self, offsets: tuple[int, ...], device: torch.device) -> ClusterTable:
        """The clusters in one row a head, where they are needed.  offsets: `cu_seqlens` of the layer."""
        bounds = self.cu_clusters.tolist()
        rows = [slice(a, b) for a, b in pairwise(bounds)]
        num_sinks = [b - a - n for a, b, n in zip(offsets, offsets[1:], self.num_clustered, strict=False)]
        sizes = _padded([torch.tensor([s]) for s in num_sinks], [self.sizes[row].long() for row in rows])
        centred = [self.centroids[row] - self.centroids[row].mean(dim=0) for row in rows]
        centroids = torch.nn.utils.rnn.pad_sequence(centred, batch_first=True)
        starts = torch.tensor(offsets[:-1]).unsqueeze(1) + sizes.cumsum(dim=1) - sizes
        budgets = torch.tensor(num_sinks).unsqueeze(1) + self.budget
        return ClusterTable(centroids.to(device), sizes.to(device), starts.to(device), budgets.to(device))


@dataclass(frozen=True)
class ClusterTable:
    """An index in rows, padded with empty clusters; the sinks of a head are the first entry of its row.

    centroids: [Hkv, C, D] float32, sinks left out, each row less its mean.  sizes, starts: [Hkv, 1 + C] int64, pairs of
    an entry and the row of its first in the layer.  budgets: [Hkv, 1] int64, sinks included.
    """

    centroids: Tensor
    sizes: Tensor
    starts: Tensor
    budgets: Tensor


def _padded(first: list[Tensor], rest: list[Tensor]) -> Tensor:
    rows = [torch.cat([a.to(b.device), b]) for a, b in zip(first, rest, strict=True)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
