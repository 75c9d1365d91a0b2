"""How a context is cut into chunks, and what asks the model to repeat them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kvzip.errors import ContextLengthError

CHUNK_LEN = 2000  # tokens repeated at a time, as in the paper
BRIDGE_LEN = 8  # tokens of the chunk before that a later repeat prompt quotes
MIN_REPLAY_LEN = 256  # tokens of a chunk, where positions are scarce


@dataclass(frozen=True)
class RepeatPrompts:
    """Token ids of the prompts that make the model repeat its context.

    first: before the first chunk.  later: before each further chunk, followed by the quoted bridge.  after: closes the
    user's turn and opens the model's.
    """

    first: Tensor
    later: Tensor
    after: Tensor

    def before(self, context_ids: Tensor, start: int) -> Tensor:
        """What asks for the chunk of `context_ids` [S] that begins at `start`."""
        bridge = context_ids[max(0, start - BRIDGE_LEN) : start]
        return torch.cat([self.later, bridge, self.after] if start else [self.first, self.after])

    @property
    def max_len(self) -> int:
        return max(self.first.numel(), self.later.numel() + BRIDGE_LEN) + self.after.numel()


@dataclass(frozen=True)
class Asking:
    """Token ids of a further turn that asks what follows some words of the context.

    before: closes the model's turn and opens the user's, up to the quoted words.  after: from these to where the model
    answers.
    """

    before: Tensor
    after: Tensor


def chunk_slices(context_len: int, chunk_len: int, *, merge_short: bool = True) -> list[slice]:
    """Consecutive chunks of `chunk_len` tokens.

    A last chunk shorter than half of that joins its neighbour: alone, its softmax would run over fewer keys and its
    scores would be too high. `merge_short=False` leaves it alone, as the official code does.
    """
    starts = list(range(0, context_len, chunk_len))
    if merge_short and len(starts) > 1 and context_len - starts[-1] < (chunk_len + 1) // 2:
        starts.pop()
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], context_len], strict=True)]


def fit_chunk_len(
    prefix_len: int, context_len: int, prompts: RepeatPrompts, chunk_len: int, max_positions: int | None
) -> int:
    """`chunk_len`, or less where the positions of the model leave less room to replay. Raises ContextLengthError."""
    if context_len < 1:
        raise ContextLengthError("the context is empty: give at least one token of text")
    if max_positions is None:
        return chunk_len
    room = max_positions - prefix_len - context_len - prompts.max_len
    longest = max(s.stop - s.start for s in chunk_slices(context_len, chunk_len))
    if longest <= room:
        return chunk_len
    least = min(context_len, MIN_REPLAY_LEN)
    if room < least:
        raise ContextLengthError(
            f"the context has {context_len} tokens, but the {max_positions} positions of this model leave room for "
            f"{max(0, max_positions - prefix_len - prompts.max_len - MIN_REPLAY_LEN)}: "
            f"shorten the text by {least - room} tokens, or take another model"
        )
    return room * 2 // 3  # the last chunk may be half as long again


def equal_parts(chunk: slice, most: int) -> list[slice]:
    """A chunk in as few equal parts as have at most that many tokens each; a token more or less."""
    total = chunk.stop - chunk.start
    count = math.ceil(total / most)
    bounds = [chunk.start + total * i // count for i in range(count + 1)]
    return [slice(*pair) for pair in pairwise(bounds)]
