"""A context and the tail of a session as named tensors with metadata, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from kvzip.context import Pairs, RaggedContext, RaggedLayer, SavedTail
from kvzip.fetch.index import ClusterIndex
from kvzip.ops.quantize import Layout, QuantizedPairs
from kvzip.store.layout import CODES, DTYPES, PLAIN_VERSION, VERSIONS, FileInfo, Storage
from kvzip.store.refusal import Refused


def storage_of(context: RaggedContext) -> Storage:
    """How the pairs of a context are to be stored."""
    levels = tuple(
        tuple((_layout_of(level.keys), _layout_of(level.values)) for level in layer.levels)
        if i not in context.shared
        else ()
        for i, layer in enumerate(context.layers)
    )
    indices = ((i, layer.clusters) for i, layer in enumerate(context.layers))
    clusters = {i: (index.budget, index.cache_steps) for i, index in indices if index is not None}
    return Storage(CODES.get(context.dtype, str(context.dtype)), levels, context.shared, clusters)


def _layout_of(pairs: Pairs) -> Layout | None:
    return None if isinstance(pairs, Tensor) else pairs.layout


def tensors_of(context: RaggedContext, tail: SavedTail | None, storage: Storage) -> dict[str, Tensor]:
    """All tensors by name, in the order of the file: wide dtypes first, so that each is aligned."""
    tensors = {name: getattr(context, name) for name in ("prefix_ids", "context_ids", "kept_bits", "ranks")}
    levels = (level for layer in context.stored_layers.values() for level in layer.levels)
    for level, (_, name, _) in zip(levels, storage.named(), strict=True):
        tensors |= _pairs_tensors(f"{name}.keys", level.keys) | _pairs_tensors(f"{name}.values", level.values)
        tensors |= {f"{name}.cu_seqlens": level.cu_seqlens, f"{name}.bias": level.bias}
        if (index := level.clusters) is not None:
            tensors |= {f"{name}.centroids": index.centroids, f"{name}.cluster_sizes": index.sizes}
            tensors[f"{name}.cu_clusters"] = index.cu_clusters
    if tail is not None:
        tensors["tail.token_ids"] = tail.token_ids
        tensors |= {f"tail.{i}.keys": t for i, t in enumerate(tail.keys) if i not in context.shared}
        tensors |= {f"tail.{i}.values": t for i, t in enumerate(tail.values) if i not in context.shared}
    present = [(name, tensor.detach()) for name, tensor in tensors.items() if tensor is not None]
    return dict(sorted(present, key=lambda item: (-item[1].dtype.itemsize, item[0])))


def _pairs_tensors(name: str, pairs: Pairs) -> dict[str, Tensor]:
    if isinstance(pairs, Tensor):
        return {name: pairs}
    found = {name: pairs.codes, f"{name}.scales": pairs.scales, f"{name}.zeros": pairs.zeros}
    return found if pairs.widths is None else found | {f"{name}.widths": pairs.widths}


def metadata_of(context: RaggedContext, tail: SavedTail | None, storage: Storage) -> dict[str, str]:
    """All metadata but `sha256`. Raises Refused."""
    turns, starts = (tail.turns, tail.turn_starts) if tail is not None else ((), ())
    if len(turns) != len(starts):
        raise Refused(f"it has {len(turns)} turns, but {len(starts)} turn starts")
    values = {
        "info": context.info.to_dict(),
        "windows": [layer.window for layer in context.layers],
        "turns": [[*turn, start] for turn, start in zip(turns, starts, strict=True)],
    }
    version = version_of(context, storage)
    if version != PLAIN_VERSION:
        values["storage"] = storage.to_dict()
    texts = {name: json.dumps(value, allow_nan=False) for name, value in values.items()}
    return {"format": "kvzip", "format_version": version} | texts


def version_of(context: RaggedContext, storage: Storage) -> str:
    """The least format version that knows what a context holds."""
    biases = (level.bias for layer in context.stored_layers.values() for level in layer.levels)
    has_half = any(bias is not None and bias.dtype == torch.float16 for bias in biases)
    is_plain = not (has_half or storage.clusters) and all(levels == ((None, None),) for levels in storage.levels)
    return PLAIN_VERSION if is_plain else VERSIONS[1 + storage.is_latest]


def context_of(tensors: Mapping[str, Tensor], header: FileInfo) -> RaggedContext:
    """The context of a file that was checked."""
    storage, layers = header.storage, dict[int, RaggedLayer]()
    for i, name, (keys, values) in reversed(list(storage.named())):  # the lowest level of a layer first
        layers[i] = RaggedLayer(
            _pairs_of(tensors, f"{name}.keys", keys, storage.code),
            _pairs_of(tensors, f"{name}.values", values, storage.code),
            tensors[f"{name}.cu_seqlens"],
            header.windows[i],
            tensors.get(f"{name}.bias"),
            layers.get(i),
            _clusters_of(tensors, name, *storage.clusters[i]) if i in storage.clusters else None,
        )
    prefix_ids, context_ids, bits = (tensors[name] for name in ("prefix_ids", "context_ids", "kept_bits"))
    ordered = tuple(layers[storage.shared.get(i, i)] for i in range(len(header.windows)))
    return RaggedContext(ordered, prefix_ids, context_ids, bits, tensors.get("ranks"), header.info)


def _clusters_of(tensors: Mapping[str, Tensor], name: str, budget: int, cache_steps: int) -> ClusterIndex:
    centroids, sizes, bounds = (tensors[f"{name}.{kind}"] for kind in ("centroids", "cluster_sizes", "cu_clusters"))
    return ClusterIndex(centroids, sizes, bounds, budget, cache_steps)


def _pairs_of(tensors: Mapping[str, Tensor], name: str, layout: Layout | None, code: str) -> Pairs:
    if layout is None:
        return tensors[name]
    scales, zeros = tensors[f"{name}.scales"], tensors[f"{name}.zeros"]
    return QuantizedPairs(tensors[name], scales, zeros, layout, DTYPES[code], tensors.get(f"{name}.widths"))


def tail_of(tensors: Mapping[str, Tensor], header: FileInfo) -> SavedTail | None:
    """The tail of a file that was checked, or None."""
    if not header.has_tail:
        return None
    layers = [header.storage.shared.get(i, i) for i in range(len(header.windows))]
    keys, values = (tuple(tensors[f"tail.{i}.{kind}"] for i in layers) for kind in ("keys", "values"))
    return SavedTail(keys, values, tensors["tail.token_ids"], header.turns, header.turn_starts)
