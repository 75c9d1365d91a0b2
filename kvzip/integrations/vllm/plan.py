"""Which tokens of a batch stand behind which context. Plain tensors and numbers, once a step and group of layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

PLAN = "kvzip_plan"  # where a step's metadata keeps what was worked out for it
T = TypeVar("T")


@dataclass(frozen=True)
class Behind:
    """One request behind a context.

    row: of the batch.  tokens: which tokens of the batch are its new ones.  length: of its tail, all tokens behind the
    handle, the new ones last.
    """

    row: int
    tokens: slice
    length: int

    @property
    def num_new(self) -> int:
        return self.tokens.stop - self.tokens.start

    @property
    def first(self) -> int:
        """The position of the first new token, counted from the end of the context."""
        return self.length - self.num_new


@dataclass(frozen=True)
class Tail(Behind):
    """With the blocks [n] of its keys and values behind the handle."""

    blocks: Tensor


@dataclass(frozen=True)
class Decoded:
    """All requests with one new token each, R of them.

    tokens: [R], in the batch.  blocks: [R, n], padded with the null block 0.  lengths: [R], tokens of each tail.
    """

    tokens: Tensor
    blocks: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class Asked:
    """What asks one context.  tokens: [T], in the batch.  positions: [T], counted from the end of the context."""

    tokens: Tensor
    positions: Tensor


@dataclass(frozen=True)
class Plan:
    """A batch with contexts in it.

    asked: by key of the context.  decoded, or None; longer: requests with several new tokens.  plain: [n], rows of the
    batch that have no context.  plain_tokens: [T], their tokens.
    """

    asked: dict[str, Asked]
    decoded: Decoded | None
    longer: tuple[Tail, ...]
    plain: Tensor
    plain_tokens: Tensor


def rows_behind(
    handles: Mapping[int, str],
    first_blocks: Sequence[int],
    query_start_loc: Sequence[int],
    seq_lens: Sequence[int],
    block_size: int,
) -> dict[str, list[Behind]]:
    """The requests of a batch of R that have new tokens behind a context, by its key.

    handles: key of the context by its first block.  first_blocks: [R].  query_start_loc: [R + 1], where the new tokens
    of each begin in the batch.  seq_lens: [R], all tokens of each, the handle's places included.
    """
    found: dict[str, list[Behind]] = {}
    for row, first in enumerate(first_blocks):
        tokens, key = slice(query_start_loc[row], query_start_loc[row + 1]), handles.get(first)
        if key is None or tokens.stop <= tokens.start:
            continue
        length = seq_lens[row] - block_size
        assert length >= tokens.stop - tokens.start, "a handle block can't be computed"
        found.setdefault(key, []).append(Behind(row, tokens, length))
    return found


def make_plan(
    handles: Mapping[int, str],
    block_table: Tensor,
    query_start_loc: Sequence[int],
    seq_lens: Sequence[int],
    block_size: int,
) -> Plan | None:
    """What a batch of R requests asks of contexts, or None where it asks none.

    block_table: [R, n] int32.  The others as in `rows_behind`.
    """
    first_blocks = block_table[: len(seq_lens), 0].tolist()
    found = rows_behind(handles, first_blocks, query_start_loc, seq_lens, block_size)
    if not found:
        return None
    every = [
        Tail(one.row, one.tokens, one.length, block_table[one.row, 1 : 1 - -one.length // block_size])
        for some in found.values()
        for one in some
    ]
    plain = sorted(set(range(len(seq_lens))) - {tail.row for tail in every})
    spans = [torch.arange(query_start_loc[row], query_start_loc[row + 1]) for row in plain]
    return Plan(
        asked={key: asked_by(some) for key, some in found.items()},
        decoded=_decoded([tail for tail in every if tail.num_new == 1]),
        longer=tuple(tail for tail in every if tail.num_new > 1),
        plain=torch.tensor(plain, dtype=torch.int64),
        plain_tokens=torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64),
    )


def asked_by(rows: Sequence[Behind]) -> Asked:
    """What requests behind the same context ask of it."""
    tokens = torch.cat([torch.arange(one.tokens.start, one.tokens.stop) for one in rows])
    positions = torch.cat([torch.arange(one.first, one.length) for one in rows])
    return Asked(tokens, positions)


def _decoded(tails: Sequence[Tail]) -> Decoded | None:
    if not tails:
        return None
    blocks = torch.zeros(len(tails), max(len(tail.blocks) for tail in tails), dtype=torch.int64)
    for row, tail in enumerate(tails):
        blocks[row, : len(tail.blocks)] = tail.blocks
    tokens, lengths = ([getattr(tail, name) for tail in tails] for name in ("tokens", "length"))
    return Decoded(torch.tensor([part.start for part in tokens]), blocks, torch.tensor(lengths))


def once(metadata: Any, make: Callable[[], T]) -> T:
    """What `make` gives for a step's metadata, made by the first layer that asks."""
    if PLAN not in metadata.__dict__:
        setattr(metadata, PLAN, make())
    found: T = metadata.__dict__[PLAN]
    return found
