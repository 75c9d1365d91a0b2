"""What a scorer is: a pure function of what it is shown; it never sees a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

NEEDS = {
    "keys": "the context's keys, rotated, and its values",
    "window_queries": "the queries of the context's last tokens while it is read",
    "prefill_queries": "the queries of all of the context's tokens while it is read",
    "replay_queries": "the queries of the model while it repeats the context, chunk by chunk",
    "hidden_states": "with replay_queries: norms of the attention's inputs, and its output projection",
    "attention_outputs": "with queries of the context: what each head puts out, and what the layer adds to the stream",
    "attention_inputs": "what enters the attention of each layer while the context is read, and keys and values",
    "head_profile": "the largest score of each KV head, made once per model by `kvzip calibrate --method head`",
    "baklava_profile": "the importance of heads and layers, made once by `kvzip calibrate --method baklava`",
    "duo_profile": "how far back each KV head looks, made once by `kvzip calibrate --method duo`",
    "distilled_profile": "how scores follow from the attention's inputs, made once by `kvzip distill`",
}
WHILE_READING = frozenset({"window_queries", "prefill_queries", "attention_inputs"})

Shape = tuple[int, int, int]
Profile = Mapping[str, Tensor]  # what is known of a model once: values [Lf, ...], float32, by name


@dataclass(frozen=True)
class Observation:
    """One full-attention layer while one chunk of the context is replayed (batch 1, rotated queries and keys).

    query: [Hq, T, D].  prefix_keys: [Hkv, P, D].  chunk_keys, chunk_values: [Hkv, m, D].  replay_keys: [Hkv, T, D],
    causal.  lse: [Hq, T] float32 over prefix + chunk + replay keys.  outputs: [Hq, T, D], what the queries take from
    these.  scale, softcap: the model's own.
    chunk: which tokens of the context these are.
    Where hidden states are needed: input_norms [T] float32, of the inputs of the layer's attention (after its input
    norm), and output_weights [Hq, D, E], which of the output projection belongs to each query head.
    """

    query: Tensor
    prefix_keys: Tensor
    chunk_keys: Tensor
    replay_keys: Tensor
    lse: Tensor
    outputs: Tensor
    scale: float
    softcap: float | None
    chunk: slice
    chunk_values: Tensor
    input_norms: Tensor | None = None
    output_weights: Tensor | None = None


@dataclass(frozen=True)
class Reading:
    """One full-attention layer while a block of the context is read: the model's own attention (batch 1, rotated).

    query: [Hq, T, D], of consecutive tokens of the context.  keys: [Hkv, S, D], of prefix and context up to and with
    the last of these tokens: row t sees the first S - T + t + 1.  lse: [Hq, T] float32 over those.
    prefix_len: tokens before the context.  scale, softcap: the model's own.  inv_freq: [R/2], its rotary frequencies.
    Where attention outputs are needed: values [Hkv, T, D] of these tokens, outputs [Hq, T, D] of their query heads,
    stream [T, E], the residual stream that enters the layer, and output_weights [Hq, D, E] as in `Observation`.
    Where attention inputs are needed: values, outputs, and inputs [T, E] of the attention, after its input norm.
    """

    query: Tensor
    keys: Tensor
    lse: Tensor
    prefix_len: int
    scale: float
    softcap: float | None
    inv_freq: Tensor | None
    values: Tensor | None = None
    outputs: Tensor | None = None
    stream: Tensor | None = None
    inputs: Tensor | None = None
    output_weights: Tensor | None = None

    @property
    def first(self) -> int:
        """The position of the first query, counted from the first prefix token."""
        return self.keys.shape[1] - self.query.shape[1]


class Observer:
    """Is shown a model while that reads and repeats one context.

    needs: what to capture, names of `NEEDS`; nothing else is shown.
    shape: full-attention layers, KV heads, tokens of the context.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    @property
    def num_queries(self) -> int:
        """How many of the context's last queries `watch` is shown."""
        return self.shape[2]

    def learn(self, profile: Profile) -> None:
        """What is known of the model, where a profile of it is needed."""

    def watch(self, layer: int, reading: Reading) -> None:
        """One full-attention layer (counted among those alone) and one block, in order of the blocks."""

    def observe(self, layer: int, observation: Observation) -> None:
        """One full-attention layer and one chunk, where replay queries are needed."""

    def read(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """The context's keys and values [Hkv, S, D] of one full-attention layer, after all else is shown."""


class Together(Observer):
    """Several observers of one replay, each shown what it needs."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        super().__init__(observers[0].shape)
        self.observers = observers
        self.needs = frozenset().union(*(observer.needs for observer in observers))  # type: ignore[misc]

    def observe(self, layer: int, observation: Observation) -> None:
        for observer in self.observers:
            if "replay_queries" in observer.needs:
                observer.observe(layer, observation)

    def read(self, layer: int, keys: Tensor, values: Tensor) -> None:
        for observer in self.observers:
            if "keys" in observer.needs:
                observer.read(layer, keys, values)


class BaseScorer(Observer):
    """Turns what it is shown into scores, higher = keep.

    summary, source: for `kvzip methods`.  is_query_agnostic: whether the source made it for prompts without the
    question. Here no scorer sees a question.  Options are the keyword-only parameters of `__init__`: `kvzip.parts`.
    """

    summary: ClassVar[str] = ""
    source: ClassVar[str] = ""
    is_query_agnostic: ClassVar[bool] = True

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self._scores = torch.zeros(shape)

    def scores(self) -> Tensor:
        """[Lf, Hkv, S] float32, no NaN.  From `selection.PINNED` on, a pair is kept before all others."""
        return self._scores
