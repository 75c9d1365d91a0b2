"""Reconstruction weighed by what a pair adds to the residual stream: KVzip+ (arXiv 2601.07891)."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from kvzip.ops.attention import column_max
from kvzip.parts import Range
from kvzip.scorers.base import Observation, Shape
from kvzip.scorers.reconstruction import ReconstructionScorer


class ReconstructionPlusScorer(ReconstructionScorer):
    """A pair's score is the largest `a * (|W_O v| / |h|)^power` over the queries of its KV head while its chunk is
    repeated.

    a: the attention weight, as in `ReconstructionScorer`.  W_O v: the pair's value through the output projection of the
    query head that looks, so the factor differs inside a group.  h: the input of the layer's attention at the query,
    after the input norm (the paper says the residual stream, the released code and weights this).  May exceed 1.
    power: 1 is KVzip+, 0 is KVzip; what lies between weighs by the norm with less trust in it.
    """

    needs = frozenset({"replay_queries", "hidden_states"})
    summary = "the same, times the norm of the projected value, over that of the query's input"
    source = "KVzip+, arXiv 2601.07891"

    def __init__(self, shape: Shape, *, power: Annotated[float, Range(0, 2)] = 1.0) -> None:
        super().__init__(shape)
        self.power = power

    def _column_scores(self, obs: Observation) -> Tensor:
        assert obs.input_norms is not None and obs.output_weights is not None
        log_norms = self.power * obs.input_norms.log()
        least = log_norms.min()
        lse = obs.lse + (log_norms - least)  # divides each row by |h|^p; none grows, as column_max bounds them by 1
        num_kv_heads = obs.chunk_keys.shape[0]
        best = torch.zeros(obs.chunk_keys.shape[:2], device=obs.query.device)
        for g in range(obs.query.shape[0] // num_kv_heads):
            heads = slice(g, None, obs.query.shape[0] // num_kv_heads)
            looked = column_max(obs.query[heads], obs.chunk_keys, lse[heads], scale=obs.scale, softcap=obs.softcap)
            added = _projected_norms(obs.chunk_values, obs.output_weights[heads]) ** self.power
            torch.maximum(best, looked * added, out=best)
        return best * torch.exp(-least)


def _projected_norms(values: Tensor, weights: Tensor) -> Tensor:
    """|W v| of values [Hkv, m, D] through weights [Hkv, D, E], a head at a time: [Hkv, m] float32."""
    rows = [(v.float() @ w.float()).norm(dim=-1) for v, w in zip(values, weights, strict=True)]
    return torch.stack(rows)
