"""Which tokens of a batch stand behind which context. Plain tensors and numbers, once a step and group of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tail:
    """One request behind a context.

    tokens: which tokens of the batch are its new ones.  blocks: of its keys and values behind the handle.  length:
    tokens in these, the new ones last.
    """

    tokens: slice
    blocks: Tensor
    length: int

    @property
    def num_new(self) -> int:
        return self.tokens.stop - self.tokens.start

    @property
    def first(self) -> int:
        """The position of the first new token, counted from the end of the context."""
        return self.length - self.num_new


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


def make_plan(
    handles: Mapping[int, str],
    block_table: Tensor,
    query_start_loc: Sequence[int],
    seq_lens: Sequence[int],
    block_size: int,
) -> Plan | None:
    """What a batch of R requests asks of contexts, or None where it asks none.

    handles: key of the context by its first block.  block_table: [R, n] int32.  query_start_loc: [R + 1], where the new
    tokens of each begin in the batch.  seq_lens: [R], all tokens of each, the handle's places included.
    """
    keys = [handles.get(first) for first in block_table[: len(seq_lens), 0].tolist()]
    keys = [key if query_start_loc[i + 1] > query_start_loc[i] else None for i, key in enumerate(keys)]
    if not any(key is not None for key in keys):
        return None
    tails: dict[str, list[Tail]] = {}
    plain = []
    for row, key in enumerate(keys):
        tokens = slice(query_start_loc[row], query_start_loc[row + 1])
        if key is None:
            plain.append(row)
            continue
        length = seq_lens[row] - block_size
        assert length >= tokens.stop - tokens.start, "a handle block can't be computed"
        blocks = block_table[row, 1 : 1 - -length // block_size]
        tails.setdefault(key, []).append(Tail(tokens, blocks, length))
    every = [tail for some in tails.values() for tail in some]
    spans = [torch.arange(query_start_loc[row], query_start_loc[row + 1]) for row in plain]
    return Plan(
        asked={key: _asked(some) for key, some in tails.items()},
        decoded=_decoded([tail for tail in every if tail.num_new == 1]),
        longer=tuple(tail for tail in every if tail.num_new > 1),
        plain=torch.tensor(plain, dtype=torch.int64),
        plain_tokens=torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64),
    )


def _asked(tails: Sequence[Tail]) -> Asked:
    tokens = torch.cat([torch.arange(tail.tokens.start, tail.tokens.stop) for tail in tails])
    positions = torch.cat([torch.arange(tail.first, tail.length) for tail in tails])
    return Asked(tokens, positions)


def _decoded(tails: Sequence[Tail]) -> Decoded | None:
    if not tails:
        return None
    blocks = torch.zeros(len(tails), max(len(tail.blocks) for tail in tails), dtype=torch.int64)
    for row, tail in enumerate(tails):
        blocks[row, : len(tail.blocks)] = tail.blocks
    tokens, lengths = ([getattr(tail, name) for tail in tails] for name in ("tokens", "length"))
    return Decoded(torch.tensor([part.start for part in tokens]), blocks, torch.tensor(lengths))
