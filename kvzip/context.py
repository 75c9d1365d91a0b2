"""The compressed context as data: immutable, ragged, plain torch.

A context is made once and then only read: sessions, threads and batch rows share it. What a question adds lives in
the session's own dense tail (`kvzip.hf.cache`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kvzip.fetch.index import ClusterIndex
from kvzip.ops.quantize import QuantizedPairs
from kvzip.ops.ragged import unpack_bits

Pairs: TypeAlias = Tensor | QuantizedPairs

MOST = 1e9  # more than any count, loss or time that a file may state
LOSS_RANGES = {  # what a statement of the loss may say, and from where to where
    "tokens": (1, MOST),  # at which the full and the compressed cache were compared
    "spans": (1, MOST),  # of the text, that hold most of them
    "questions": (0, MOST),  # made of the text, that hold some of them
    "kl_questions": (0, MOST),  # as `kl`, over these; absent where there are none
    "kl": (0, MOST),  # mean KL(full || compressed) a token, in nats
    "kl_bound": (0, MOST),  # upper confidence limit of the mean over all such spans and questions
    "confidence": (0, 1),  # of that limit
    "agreement": (0, 1),  # share of the tokens where the likeliest next token stays the same
    "repeated_full": (0, 1),  # share of the tokens where the full cache's likeliest is the text's own
    "repeated": (0, 1),  # the same of the compressed one
    "seconds": (0, MOST),  # that measuring took
}


@dataclass(frozen=True, eq=False)
class RaggedLayer:
    """The kept KV pairs of one layer.

    keys, values: [N, D], segments sorted by KV head, positions ascending inside a head.  cu_seqlens: [Hkv + 1] int32.
    window: None in a full-attention layer. In a sliding-window layer the model's window in tokens, and every head then
    holds the last `n` tokens before the question without a gap.
    bias: [N] float32 or float16, added to the logits of each pair, or None.
    lower: further pairs of the same heads, stored in another precision, or None; attention runs over all of them.
    clusters: what finds the pairs that a query needs, where they stay in a file; they stand in its order then. Or None.
    Keys stand in the canonical rotation: the first token of a question has position 0.
    """

    keys: Pairs
    values: Pairs
    cu_seqlens: Tensor
    window: int | None = None
    bias: Tensor | None = None
    lower: RaggedLayer | None = None
    clusters: ClusterIndex | None = None

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """`cu_seqlens` as Python integers."""
        return tuple(self.cu_seqlens.tolist())

    @property
    def num_kv_heads(self) -> int:
        return len(self.offsets) - 1

    @property
    def head_dim(self) -> int:
        return self.keys.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """What keys and values are read as."""
        return self.keys.dtype

    @property
    def device(self) -> torch.device:
        return self.keys.device

    @property
    def is_quantized(self) -> bool:
        """Whether keys or values of this level stand in codes."""
        return not (isinstance(self.keys, Tensor) and isinstance(self.values, Tensor))

    @cached_property
    def levels(self) -> tuple[RaggedLayer, ...]:
        """This layer's pairs and those below, by precision."""
        return (self, *(self.lower.levels if self.lower is not None else ()))

    @property
    def seqlens(self) -> list[int]:
        """KV pairs of each head, of all levels."""
        own = [end - start for start, end in zip(self.offsets, self.offsets[1:], strict=False)]
        return own if self.lower is None else [a + b for a, b in zip(own, self.lower.seqlens, strict=True)]

    def part(self, chosen: Tensor) -> RaggedLayer:
        """The pairs that are chosen, [N] bool, by head and in their order, of a layer of numbers."""
        assert isinstance(self.keys, Tensor) and isinstance(self.values, Tensor) and self.lower is None
        counts = [int(chosen[start:end].sum()) for start, end in pairwise(self.offsets)]
        offsets = torch.tensor([0, *counts], device=self.device).cumsum(0, dtype=torch.int32)
        bias = None if self.bias is None else self.bias[chosen]
        return replace(self, keys=self.keys[chosen], values=self.values[chosen], cu_seqlens=offsets, bias=bias)

    def heads(self, start: int, stop: int) -> RaggedLayer:
        """The KV heads `start` to `stop` alone, of all levels; views. Not of a layer with clusters."""
        assert self.clusters is None
        rows = slice(self.offsets[start], self.offsets[stop])
        keys, values = (
            pairs[rows] if isinstance(pairs, Tensor) else pairs.heads(self.offsets, start, stop)
            for pairs in (self.keys, self.values)
        )
        return RaggedLayer(
            keys,
            values,
            self.cu_seqlens[start : stop + 1] - self.cu_seqlens[start],
            self.window,
            None if self.bias is None else self.bias[rows],
            None if self.lower is None else self.lower.heads(start, stop),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values, their scales, offsets, biases and clusters, of all levels."""
        parts = (self.keys, self.values, self.cu_seqlens, self.bias, self.lower, self.clusters)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def resident_nbytes(self) -> int:
        """Of `nbytes`, what one conversation has in memory at a step: with clusters, these and the pairs it fetched."""
        if self.clusters is None:
            return self.nbytes
        fetched = sum(self.clusters.num_seen(self.seqlens)) * max(1, self.clusters.cache_steps)
        pair_nbytes = (self.keys.nbytes + self.values.nbytes) // max(1, self.offsets[-1])
        outside = self.nbytes - self.keys.nbytes - self.values.nbytes
        return outside + min(fetched, self.offsets[-1]) * pair_nbytes

    def read(self, head: int, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values [n, D] of some pairs of a head in this level, counted from its first; views where dense."""
        first, end = self.offsets[head], self.offsets[head + 1]
        stop = end - first if stop is None else stop
        keys, values = (
            pairs[first + start : first + stop]
            if isinstance(pairs, Tensor)
            else pairs.read(self.offsets, head, start, stop)
            for pairs in (self.keys, self.values)
        )
        return keys, values

    def dense(self) -> tuple[Tensor, Tensor]:
        """Keys and values [N, D] of this level, all at once."""
        if isinstance(self.keys, Tensor) and isinstance(self.values, Tensor):
            return self.keys, self.values
        keys, values = zip(*map(self.read, range(self.num_kv_heads)), strict=True)
        return torch.cat(keys), torch.cat(values)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> RaggedLayer:
        """The same layer on another device, keys and values in `dtype`.

        With clusters it stays where it is: what is fetched goes to the device. Only another dtype has it copied.
        """
        if self.clusters is not None:
            return replace(self, keys=self.keys.to(self.device, dtype), values=self.values.to(self.device, dtype))
        return RaggedLayer(
            self.keys.to(device, dtype),
            self.values.to(device, dtype),
            self.cu_seqlens.to(device),
            self.window,
            None if self.bias is None else self.bias.to(device),
            None if self.lower is None else self.lower.to(device, dtype),
        )


@dataclass(frozen=True)
class ContextInfo:
    """What is known about how a context was made. All of it is stored in the file.

    fingerprint: identity of model and tokenizer (`kvzip.hf.fingerprint`).  keep_ratio: fraction of the context's KV
    pairs kept in full-attention layers, as asked (None where a budget was asked) and as reached.
    full_kv_nbytes: bytes that prefix and context take in the model's own full cache.  *_s: seconds.
    peak_rss_bytes: highest resident memory of the process while compressing.  loss: what was measured of it on the text
    itself (`kvzip.certificate`), with keys of LOSS_RANGES, or None.  chosen: what a search chose, and why, in words.
    """

    model: str
    fingerprint: str
    method: str
    dtype: str
    keep_ratio_asked: float | None
    budget_asked: str | None
    keep_ratio: float
    full_kv_nbytes: int
    prefill_s: float = 0.0
    score_s: float = 0.0
    total_s: float = 0.0
    peak_rss_bytes: int = 0
    system: str | None = None
    instruction: str | None = None
    source: str | None = None
    created: str = ""
    kvzip_version: str = ""
    loss: dict[str, Any] | None = None
    chosen: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ContextInfo:
        """Inverse of `to_dict`; keys of later versions are ignored."""
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in data.items() if k in known})


@dataclass(frozen=True, eq=False)
class RaggedContext:
    """A compressed context: the kept pairs of all layers, and which tokens they came from.

    layers: one a model layer; a layer that uses the keys and values of a lower one is the very same object.
    prefix_ids: [P] int32, tokens before the context (chat template, system prompt), never evicted.  context_ids: [S]
    int32.  kept_bits: `pack_bits` of the keep mask [Lf, Hkv, S] bool over the Lf full-attention layers that are not
    shared; the prefix is not in it.
    ranks: [Lf, Hkv, S] uint8 or None: 256 x the share of pairs in the same pool of the budget that scored lower, so
    that `ranks >= 256 * (1 - r)` is nearly the keep mask at keep ratio r.
    """

    layers: tuple[RaggedLayer, ...]
    prefix_ids: Tensor
    context_ids: Tensor
    kept_bits: Tensor
    ranks: Tensor | None
    info: ContextInfo

    @property
    def prefix_len(self) -> int:
        return self.prefix_ids.numel()

    @property
    def context_len(self) -> int:
        """Tokens of the context, prefix left out."""
        return self.context_ids.numel()

    @property
    def logical_len(self) -> int:
        """Positions taken by prefix and context, whatever was evicted; a question's true position starts here."""
        return self.prefix_len + self.context_len

    @cached_property
    def shared(self) -> dict[int, int]:
        """Layers that store nothing, each with the lower layer whose keys and values it uses."""
        first: dict[int, int] = {}
        sources = [first.setdefault(id(layer), i) for i, layer in enumerate(self.layers)]
        return {i: source for i, source in enumerate(sources) if source != i}

    @property
    def stored_layers(self) -> dict[int, RaggedLayer]:
        """The layers that hold something, by index."""
        return {i: layer for i, layer in enumerate(self.layers) if i not in self.shared}

    @cached_property
    def full_layers(self) -> tuple[int, ...]:
        """Indices of the full-attention layers that hold something, the ones that were compressed."""
        return tuple(i for i, layer in self.stored_layers.items() if layer.window is None)

    @property
    def kept_shape(self) -> tuple[int, int, int]:
        num_kv_heads = self.layers[self.full_layers[0]].num_kv_heads if self.full_layers else 0
        return len(self.full_layers), num_kv_heads, self.context_len

    @property
    def keep_mask(self) -> Tensor:
        """[Lf, Hkv, S] bool, True = kept; made anew at each call."""
        return unpack_bits(self.kept_bits, self.kept_shape)

    @property
    def pairs_per_head(self) -> list[list[int]]:
        """KV pairs held by each layer and head, prefix and sliding windows included: [L][Hkv]; 0 in shared layers."""
        return [[0] * x.num_kv_heads if i in self.shared else x.seqlens for i, x in enumerate(self.layers)]

    @property
    def resident_kv_nbytes(self) -> int:
        """Of `kv_nbytes`, what one conversation has in memory at a step; less only where pairs are fetched."""
        return sum(layer.resident_nbytes for layer in self.stored_layers.values())

    @property
    def is_fetched(self) -> bool:
        """Whether pairs of some layer stay in a file until a step needs them."""
        return any(layer.clusters is not None for layer in self.layers)

    @property
    def kv_nbytes(self) -> int:
        """Bytes that are held: keys, values, their scales, offsets and biases of all layers, shared ones once."""
        return sum(layer.nbytes for layer in self.stored_layers.values())

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].dtype

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> RaggedContext:
        """The same context with its layers on another device and in another dtype."""
        moved = {i: layer.to(device, dtype) for i, layer in self.stored_layers.items()}
        layers = tuple(moved[self.shared.get(i, i)] for i in range(len(self.layers)))
        return RaggedContext(layers, self.prefix_ids, self.context_ids, self.kept_bits, self.ranks, self.info)


@dataclass(frozen=True, eq=False)
class SavedTail:
    """The dense tail of a session, as it is stored beside its context.

    keys, values: one [1, Hkv, T, D] tensor a layer; of a shared layer, those of its source.  token_ids: [T'] int32, the
    tokens of the conversation after the context; the last one may not be in the tail yet, so T' is T or T + 1.
    turns: (question, answer) pairs.  turn_starts: how many of `token_ids` came before each turn.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    token_ids: Tensor
    turns: tuple[tuple[str, str], ...]
    turn_starts: tuple[int, ...] = ()
