"""Reconstruction scores foretold from what enters each layer's attention (after KVzap, arXiv 2601.07891)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvzip.chunks import CHUNK_LEN, chunk_slices
from kvzip.scorers.base import BaseScorer, Profile, Reading, Shape

LARGEST_LOG = 60.0  # far beyond what a score can be; its exponential is below PINNED
TINY = torch.finfo(torch.float32).tiny


class DistilledScorer(BaseScorer):
    """A pair's score is exp(w . x + b): what `ReconstructionScorer` would say, as a linear map foretells it.

    x: `features` of the token, known as soon as it is read.  w, b: fitted to the model's own scores by
    `kvzip distill`, one for each KV head.  Above 0, rarely above 1; comparable across layers and heads, as the scores
    that it is fitted to are. There is no replay, and what a token costs does not grow with the text.
    """

    needs = frozenset({"attention_inputs", "distilled_profile"})
    summary = "reconstruction, foretold from what enters the attention"
    source = "after KVzap, arXiv 2601.07891"

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self._places = places(shape[2])

    def learn(self, profile: Profile) -> None:
        """weight: [Lf, F, Hkv], bias: [Lf, Hkv], float32."""
        self._weight, self._bias = profile["weight"], profile["bias"]

    def watch(self, layer: int, reading: Reading) -> None:
        rows = features(reading, self._places)
        weight, bias = self._weight[layer].to(rows.device), self._bias[layer].to(rows.device)
        log_scores = torch.addmm(bias, rows, weight).clamp(-LARGEST_LOG, LARGEST_LOG)
        first = reading.first - reading.prefix_len
        self._scores[layer, :, first : first + len(rows)] = log_scores.exp().T.cpu()


def features(reading: Reading, places: Tensor) -> Tensor:
    """What the scores of a layer's tokens are foretold from: [T, E + 4 Hkv + 3] float32.

    The attention's inputs; of each KV head the norm of the key, of the value, and the logarithms of both; and where the
    token is (places: [S, 3], of all tokens of the context).
    """
    assert reading.inputs is not None and reading.values is not None
    num_tokens = reading.values.shape[1]
    pairs = torch.cat([reading.keys[:, -num_tokens:], reading.values])
    norms = torch.linalg.vector_norm(pairs.float(), dim=-1).T
    first = reading.first - reading.prefix_len
    own = places[first : first + num_tokens].to(norms.device)
    return torch.cat([reading.inputs.float(), norms, norms.clamp_min(TINY).log(), own], dim=1)


def num_features(hidden_size: int, num_kv_heads: int) -> int:
    """How many there are for attention inputs of that size."""
    return hidden_size + 4 * num_kv_heads + 3


def places(context_len: int) -> Tensor:
    """Of each token of a context, by the chunk that a replay would repeat it with: [S, 3] float32.

    Its place there, in [0, 1), the square of that, and the logarithm of the chunk's length: attention that is spread
    over all of a chunk is the weaker the longer it is, so heads stand to one another otherwise in a short text.
    """
    lengths = [chunk.stop - chunk.start for chunk in chunk_slices(context_len, CHUNK_LEN)]
    place = torch.cat([torch.arange(length) / length for length in lengths])
    log_length = torch.cat([torch.full((length,), math.log(length)) for length in lengths])
    return torch.stack([place, place.square(), log_length], dim=1)
