"""Slots of portable contexts into vLLM's paged cache, by the attention backend's own writer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvzip.integrations.vllm.opened import LayerShape, Rank, first_head
from kvzip.portable import PortableContext


@dataclass(frozen=True)
class Target:
    """A layer of this worker.  module: vLLM's own.  group: of layers, whose blocks it uses."""

    module: Any
    group: int
    shape: LayerShape


def load_slots(
    context: PortableContext,
    start: int,
    stop: int,
    blocks: Sequence[Sequence[int]],
    targets: dict[int, Target],
    rank: Rank,
    block_size: int,
) -> None:
    """Write slots `start` to `stop` into a request's blocks, one list a group, in all layers of this worker."""
    for number, target in targets.items():
        rows, places = places_of(blocks[target.group], start, stop, block_size)
        first = first_head(rank, target.shape)
        heads = slice(first, first + target.shape.num_kv_heads)
        keys, values = (
            pairs[rows, heads].to(rank.device, rank.dtype).contiguous() for pairs in context.slots(number, start, stop)
        )
        module = target.module
        module.impl.do_kv_cache_update(module, keys, values, module.kv_cache, places.to(rank.device))


def places_of(blocks: Sequence[int], start: int, stop: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Which of the slots `start` to `stop` have a block, counted from `start`, and where in the cache they go: int64.

    Those in the null block 0 are left out: a window has left them behind.
    """
    slots = torch.arange(start, stop)
    own = torch.tensor(list(blocks))[slots // block_size]
    rows = own.nonzero().squeeze(1)
    return rows, own[rows] * block_size + slots[rows] % block_size
