"""The portable layout as data: one count of KV pairs in all heads, for engines that count one slot a token.

`store.portable` is its file, `export` makes it of a compressed context.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvzip.budget import Amounts, resolve_pairs
from kvzip.context import ContextInfo, RaggedContext, RaggedLayer
from kvzip.errors import BudgetError, InputError
from kvzip.ops.ragged import pack_bits
from kvzip.ops.rope import shift_keys
from kvzip.ops.selection import top_mask

MAX_RANK = 255  # of `RaggedContext.ranks`


@dataclass(frozen=True)
class Origin:
    """The compressed context that a portable one was made of: its own method, share of pairs, bytes and loss.

    loss: with keys of LOSS_RANGES, or None.  left_out: what it has that the portable layout has no room for, of
    "biases", "codes" and "clusters"; the pairs of the portable context are plain then.
    """

    method: str
    keep_ratio: float
    kv_nbytes: int
    loss: dict[str, Any] | None
    left_out: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class PortableLayer:
    """One layer.  keys, values: [n, Hkv, D], the last n slots; all of them unless it has a sliding window in tokens."""

    keys: Tensor
    values: Tensor
    window: int | None = None


@dataclass(frozen=True, eq=False)
class PortableContext:
    """M slots in every layer and head, whose keys stand where a question begins at position M.

    layers: of a full-attention layer all slots, the first P the prefix, then pairs of the context by their true
    position, other ones in each head. Of a sliding-window layer the last min(window - 1, N) tokens in the last slots:
    no later token sees an older one.  prefix_len: P.  logical_len: N, the tokens of prefix and context.
    info: of this context; its `loss` is that of these pairs.  origin: what they were taken from.
    """

    layers: tuple[PortableLayer, ...]
    prefix_len: int
    logical_len: int
    info: ContextInfo
    origin: Origin

    @property
    def num_pairs(self) -> int:
        """M, the slots of each head, prefix included: where a question begins."""
        return max(len(layer.keys) for layer in self.layers)

    @property
    def kv_nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)

    def slots(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values [stop - start, Hkv, D] of a layer's slots, 0 <= start <= stop <= M.

        Views; only where slots are asked for that no later token sees, copies with zeros in these.
        """
        keys, values = self.layers[layer].keys, self.layers[layer].values
        missing = self.num_pairs - len(keys)
        unseen, first, end = max(0, min(stop, missing) - start), max(0, start - missing), max(0, stop - missing)
        if not unseen:
            return keys[first:end], values[first:end]
        padding = keys.new_zeros(unseen, *keys.shape[1:])
        return torch.cat([padding, keys[first:end]]), torch.cat([padding, values[first:end]])


def num_last(window: int, logical_len: int) -> int:
    """Tokens that the slots of a sliding-window layer hold: all that a question can see."""
    return min(window - 1, logical_len)


def left_out(context: RaggedContext) -> tuple[str, ...]:
    """See `Origin`."""
    levels = [level for layer in context.stored_layers.values() for level in layer.levels]
    found = {
        "biases": any(level.bias is not None for level in levels),
        "codes": any(level.is_quantized or level.lower is not None for level in levels),
        "clusters": context.is_fetched,
    }
    return tuple(name for name, is_there in found.items() if is_there)


def count_for(context: RaggedContext, keep_ratio: float | None = None) -> int:
    """Context pairs that each full-attention head is to keep: those of a keep ratio evenly divided, rounded down.

    keep_ratio: None = as many as the context itself holds.
    Raises BudgetError where that is none, or fewer than a sliding window sees; InputError for shared layers.
    """
    if context.shared:
        raise InputError(
            "layers that share pairs have no portable layout: compress the text again by a method without kvsharer"
        )
    num_layers, num_heads, context_len = context.kept_shape
    heads, mask = num_layers * num_heads, context.keep_mask
    asked = keep_ratio is not None
    amounts = Amounts(mask.numel(), fixed_nbytes=0, pair_nbytes=1.0, full_nbytes=mask.numel())
    pairs = resolve_pairs(keep_ratio, None, amounts) if asked else int(mask.sum())
    count, prefix_len = pairs // heads, context.prefix_len
    windows = [layer.window for layer in context.layers if layer.window is not None]
    seen = max((num_last(window, context.logical_len) for window in windows), default=0)
    needed = max(1, seen - prefix_len)
    if count < needed:
        least = min(1.0, math.ceil(1000 * needed / context_len) / 1000)
        why = f"sliding windows see {seen} tokens" if seen > prefix_len else "a head would keep nothing of the context"
        raise BudgetError(
            f"keep ratio {pairs / mask.numel():.3g} leaves {count + prefix_len} slots, prefix included, but {why}: "
            f"give a keep ratio of {least} or more"
        )
    return count


def uniform_mask(context: RaggedContext, count: int) -> Tensor:
    """The keep mask [Lf, Hkv, S] with `count` pairs in each head: of those that the context holds, then of the others,
    the best by rank; ties go to the lower index.

    Raises InputError where there is a choice to make and the context has no ranks.
    """
    kept = context.keep_mask
    if context.ranks is None:
        if bool((kept.sum(dim=-1) == count).all()):
            return kept
        raise InputError(
            f"this context has no ranks to choose {count} pairs in each head by, as its method {context.info.method!r} "
            "decided without: compress the text again with the method kvzip+uniform"
        )
    order = context.ranks + (MAX_RANK + 1.0) * kept.float()
    return top_mask(order.flatten(0, 1), count).reshape(kept.shape)


def holds(context: RaggedContext, mask: Tensor) -> bool:
    """Whether all pairs of the mask are in the context, as plain numbers in the order of positions."""
    return not left_out(context) and bool((context.keep_mask | ~mask).all())


def cut(context: RaggedContext, mask: Tensor) -> RaggedContext:
    """The context with the pairs of the mask alone, all of which it holds."""
    layers, kept = list(context.layers), context.keep_mask
    for number, index in enumerate(context.full_layers):
        before, after = (torch.nn.functional.pad(m[number], (context.prefix_len, 0), value=True) for m in (kept, mask))
        layers[index] = layers[index].part(after[before].to(layers[index].device))
    return replace(context, layers=tuple(layers), kept_bits=pack_bits(mask))


def portable(
    context: RaggedContext, inv_freqs: Sequence[Tensor | None], info: ContextInfo, origin: Origin
) -> PortableContext:
    """The portable form of a context that holds the same count of plain pairs in all full-attention heads.

    inv_freqs: [R/2] of each layer's rotation, or None where it has none.
    """
    num_pairs = context.layers[context.full_layers[0]].seqlens[0]
    layers = tuple(
        _layer(layer, inv_freq, num_pairs, context.logical_len)
        for layer, inv_freq in zip(context.layers, inv_freqs, strict=True)
    )
    return PortableContext(layers, context.prefix_len, context.logical_len, info, origin)


def _layer(layer: RaggedLayer, inv_freq: Tensor | None, num_pairs: int, logical_len: int) -> PortableLayer:
    count = num_pairs if layer.window is None else num_last(layer.window, logical_len)
    keys, values = (
        pairs.reshape(layer.num_kv_heads, -1, layer.head_dim)[:, layer.seqlens[0] - count :] for pairs in layer.dense()
    )
    keys = shift_keys(keys.float(), inv_freq, num_pairs).to(values.dtype)  # a coarse type is rounded once
    return PortableLayer(keys.transpose(0, 1).contiguous(), values.transpose(0, 1).contiguous(), layer.window)
