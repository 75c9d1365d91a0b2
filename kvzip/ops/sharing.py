"""Which layers may use the keys and values of another one: the search of KVSharer (arXiv 2410.18517)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

THRESHOLD = 0.5  # the paper's: least similarity of what the model puts out with and without a pair

Shared = dict[int, int]  # layer -> the lower layer, not shared itself, whose keys and values it uses


def mean_states(caches: Iterable[Sequence[tuple[Tensor, Tensor]]]) -> list[Tensor]:
    """One vector a layer: its keys and values averaged over texts, flattened, and averaged with each other.

    caches: for each text, keys and values [Hkv, T, D] of each layer, with the same T.  Returns [Hkv * T * D] float64.
    """
    total: list[Tensor] = []
    count = 0
    for cache in caches:
        states = [(keys.double().flatten() + values.double().flatten()) / 2 for keys, values in cache]
        total = states if not count else [a + b for a, b in zip(total, states, strict=True)]
        count += 1
    return [states / count for states in total]


def by_distance(pairs: Iterable[tuple[int, int]], states: Mapping[int, Tensor]) -> list[tuple[int, int]]:
    """Pairs (layer, source) with the largest Euclidean distance of their `mean_states` first; ties in given order."""
    return sorted(pairs, key=lambda pair: -float(torch.dist(states[pair[0]], states[pair[1]])))


def search_shared(
    pairs: Iterable[tuple[int, int]], num_shared: int, similarity: Callable[[Shared], float], threshold: float
) -> Shared:
    """Up to `num_shared` layers that are shared, from candidate pairs (layer, source < layer), the best first.

    A pair is kept where the similarity, measured with all pairs so far, is above the threshold. A source that is shared
    itself stands for its own source, so no map has a chain. Fewer are found where the pairs run out.
    """
    shared: Shared = {}
    for layer, source in pairs:
        if len(shared) >= num_shared:
            break
        if layer in shared:
            continue
        candidate = joined(shared, layer, source)
        if similarity(candidate) > threshold:
            shared = candidate
    return shared


def joined(shared: Mapping[int, int], layer: int, source: int) -> Shared:
    """The map with one more pair, without chains: who used `layer` uses its source from now on."""
    source = shared.get(source, source)
    moved = {other: source if used == layer else used for other, used in shared.items()}
    return {**moved, layer: source}
