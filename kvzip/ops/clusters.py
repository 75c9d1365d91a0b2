"""Clusters of keys, and which of them a query needs (ClusterKV, arXiv 2412.03213)."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_LOGITS = 1 << 20  # products of keys and centroids that exist at a time


def cluster_keys(
    keys: Tensor, num_clusters: int, *, iterations: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Spherical k-means: each key goes to the centroid with the largest cosine, a centroid is the mean of its keys.

    keys: [n, D], as attention sees them (after rotary embedding).  num_clusters: 1 <= C <= n, fewer may come out.
    iterations: at least 1; fewer where nothing changes any more.  generator: draws the keys that begin as centroids,
    and those that take the place of an empty cluster's.
    Returns (order [n] int64, sizes [C] int64, centroids [C, D] float32): `keys[order]` stands cluster by cluster, in
    the order of `keys` inside one; no cluster is empty; a centroid is the mean of the keys as they are, not normalised.
    """
    drawn = torch.randperm(len(keys), generator=generator)[:num_clusters].to(keys.device)
    centroids, labels = keys[drawn].float(), torch.full((len(keys),), -1, device=keys.device)
    for _ in range(iterations):
        found = nearest(keys, centroids)
        if torch.equal(found, labels):
            break
        labels = found
        centroids, sizes = _means(keys, labels, num_clusters)
        empty = (sizes == 0).nonzero().squeeze(1)
        anew = torch.randint(len(keys), (len(empty),), generator=generator)
        centroids[empty] = keys[anew.to(keys.device)].float()
    filled = sizes > 0
    return labels.argsort(stable=True), sizes[filled], centroids[filled]


def nearest(keys: Tensor, centroids: Tensor) -> Tensor:
    """For each key [n, D] the centroid [C, D] with the largest cosine: [n] int64, the lower index of equal ones."""
    directions = torch.nn.functional.normalize(centroids.float(), dim=1).t()
    step = max(1, BLOCK_LOGITS // len(centroids))
    return torch.cat([(block.float() @ directions).argmax(dim=1) for block in torch.split(keys, step)])


def _means(keys: Tensor, labels: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Mean key [C, D] float32 and size [C] int64 of each cluster; an empty one has mean 0."""
    sums = torch.zeros(num_clusters, keys.shape[1], device=keys.device)
    for block, where in zip(*(torch.split(t, BLOCK_LOGITS) for t in (keys, labels)), strict=True):
        sums.index_add_(0, where, block.float())
    sizes = torch.bincount(labels, minlength=num_clusters)
    return sums / sizes.clamp_min(1).unsqueeze(1), sizes


def cluster_scores(query: Tensor, centroids: Tensor) -> Tensor:
    """How much the queries of a KV head want each of its clusters: the largest of their products with the centroid.

    query: [R, Hq, D], one row a token.  centroids: [Hkv, C, D] float32, the mean over C taken off where a query head
    whose products are all large shall not decide alone.  Returns [R, Hkv, C] float32.
    """
    num_kv_heads, _, head_dim = centroids.shape
    grouped = query.float().reshape(len(query), num_kv_heads, -1, head_dim)
    return (grouped @ centroids.transpose(1, 2)).amax(dim=2)


def take_clusters(scores: Tensor, sizes: Tensor, budgets: Tensor) -> Tensor:
    """How many keys of each cluster are taken: best cluster first, until the budget, the last one cut to fit it.

    scores: [..., C].  sizes: [..., C] int64, broadcast to it.  budgets: [..., 1] int64, keys of each row.
    Returns [..., C] int64 that sums to the budget in each row, or to all keys where there are fewer; of equal scores
    the lower index comes first.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    ranked = sizes.expand_as(scores).gather(-1, order)
    taken = (budgets - (ranked.cumsum(dim=-1) - ranked)).clamp_min(0).minimum(ranked)
    return torch.zeros_like(ranked).scatter_(-1, order, taken)


def rows_of_runs(starts: Tensor, lengths: Tensor) -> Tensor:
    """The rows of runs laid end to end: [sum of lengths] int64 from starts and lengths [...] int64."""
    starts, lengths = starts.flatten(), lengths.flatten()
    before = lengths.cumsum(0) - lengths
    shifts = torch.repeat_interleave(starts - before, lengths)
    return shifts + torch.arange(len(shifts), device=shifts.device)
