"""What a scorer is: a pure function of observed attention; it never sees a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Observation:
    """One full-attention layer while one chunk of the context is replayed (batch 1, rotated queries and keys).

    query: [Hq, T, D].  prefix_keys: [Hkv, P, D].  chunk_keys: [Hkv, m, D].  replay_keys: [Hkv, T, D], causal.
    lse: [Hq, T] float32 over prefix + chunk + replay keys.  scale, softcap: the model's own.
    chunk: which tokens of the context these are.
    """

    query: Tensor
    prefix_keys: Tensor
    chunk_keys: Tensor
    replay_keys: Tensor
    lse: Tensor
    scale: float
    softcap: float | None
    chunk: slice


class Scorer(Protocol):
    """Collects observations and turns them into scores, higher = keep.

    needs: what to capture, names of `NEEDS`.
    """

    needs: frozenset[str]

    def observe(self, layer: int, observation: Observation) -> None:
        """One full-attention layer (counted among those alone) and one chunk, where replay queries are needed."""
        ...

    def read(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """The context's keys and values [Hkv, S, D] of one full-attention layer, where keys are needed."""
        ...

    def scores(self) -> Tensor:
        """[Lf, Hkv, S] float32 over the full-attention layers and the tokens of the context."""
        ...


NEEDS = {
    "keys": "the context's keys, rotated, and its values",
    "replay_queries": "the queries of the model while it repeats the context, chunk by chunk",
}
