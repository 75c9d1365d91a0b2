"""Clusters of similar keys (arXiv 2412.03213)."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Annotated

import torch
from torch import Tensor

from kvzip.context import RaggedLayer
from kvzip.fetch.base import BaseFetch
from kvzip.fetch.index import ClusterIndex
from kvzip.ops.clusters import cluster_keys
from kvzip.parts import Range


class ClusterFetch(BaseFetch):
    """A query sees the clusters whose mean key it points to most, `budget` pairs in each head.

    budget: pairs that a query sees in each head, besides sinks and what came after the context.  tokens_per_cluster:
    pairs of a cluster on average.  num_sinks: first pairs of a head that stand in no cluster and are always seen.
    skip_first: layers of the model, from the first on, that keep full attention.  iterations: of k-means, at most.
    cache_steps: steps for which fetched pairs stay in memory; 0 = none do.  seed: of the keys that k-means begins with.
    """

    summary = "the pairs stay in a file, each step fetches the clusters its query needs"
    source = "ClusterKV, arXiv 2412.03213"

    def __init__(
        self,
        *,
        budget: Annotated[int, Range(1)] = 1024,
        tokens_per_cluster: Annotated[int, Range(1)] = 80,
        num_sinks: Annotated[int, Range(0)] = 16,
        skip_first: Annotated[int, Range(0)] = 2,
        iterations: Annotated[int, Range(1)] = 20,
        cache_steps: Annotated[int, Range(0, 64)] = 1,
        seed: Annotated[int, Range(0)] = 0,
    ) -> None:
        self.budget, self.tokens_per_cluster, self.num_sinks = budget, tokens_per_cluster, num_sinks
        self.skip_first, self.iterations, self.cache_steps, self.seed = skip_first, iterations, cache_steps, seed

    def apply(self, layer: RaggedLayer, index: int) -> RaggedLayer:
        if index < self.skip_first:
            return layer
        keys, values = layer.dense()
        generator = torch.Generator().manual_seed(self.seed)
        heads = [self._cluster(keys, a, b, generator) for a, b in pairwise(layer.offsets)]
        order, sizes, centroids = (torch.cat(found) for found in zip(*heads, strict=True))
        counts = torch.tensor([0, *(len(found[1]) for found in heads)])
        clusters = ClusterIndex(
            centroids, sizes.int(), counts.cumsum(0).int().to(keys.device), self.budget, self.cache_steps
        )
        bias = None if layer.bias is None else layer.bias[order]
        return replace(layer, keys=keys[order], values=values[order], bias=bias, clusters=clusters)

    def _cluster(self, keys: Tensor, start: int, end: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Of one head: the rows of its pairs, sinks first, then cluster after cluster; sizes and centroids."""
        rows = torch.arange(start, end, device=keys.device)
        sinks, rest = rows[: self.num_sinks], rows[self.num_sinks :]
        if not len(rest):
            return sinks, rows[:0], keys.new_zeros(0, keys.shape[1], dtype=torch.float32)
        num_clusters = max(1, len(rest) // self.tokens_per_cluster)
        found = cluster_keys(keys[rest], num_clusters, iterations=self.iterations, generator=generator)
        return torch.cat([sinks, rest[found[0]]]), found[1], found[2]
