"""Maximum attention while the model repeats its context: the KVzip method (arXiv 2505.23416, algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvzip.ops.attention import column_max
from kvzip.scorers.base import BaseScorer, Observation


class ReconstructionScorer(BaseScorer):
    """A pair's score is the largest attention weight it gets from any query of its KV head while its chunk is repeated.

    The softmax runs in float32 over prefix + chunk + replay keys, with the model's own scale and soft cap; the queries
    of the repeat prompt count too. Scores lie in [0, 1].
    """

    needs = frozenset({"replay_queries"})
    summary = "largest attention a pair gets while the model repeats the context"
    source = "KVzip, arXiv 2505.23416"

    def observe(self, layer: int, observation: Observation) -> None:
        self._scores[layer, :, observation.chunk] = self._column_scores(observation).float().cpu()

    def _column_scores(self, obs: Observation) -> Tensor:
        return column_max(obs.query, obs.chunk_keys, obs.lse, scale=obs.scale, softcap=obs.softcap)


class FaithfulReconstructionScorer(ReconstructionScorer):
    """The official repository's choices: softmax in the model's dtype, scale 1/sqrt(D), no soft cap, all at once."""

    summary = "the same by the choices of the authors' code"

    def _column_scores(self, obs: Observation) -> Tensor:
        num_kv_heads, q_len, head_dim = obs.replay_keys.shape
        keys = torch.cat([obs.prefix_keys, obs.chunk_keys, obs.replay_keys], dim=1)
        query = obs.query.reshape(num_kv_heads, -1, q_len, head_dim)
        logits = query @ keys.unsqueeze(1).transpose(2, 3) / head_dim**0.5
        future = torch.ones(q_len, q_len, dtype=torch.bool, device=keys.device).triu(1)
        logits[..., -q_len:].masked_fill_(future, -torch.inf)
        weights = torch.softmax(logits, dim=-1)
        prefix_len = obs.prefix_keys.shape[1]
        return weights[..., prefix_len:-q_len].amax(dim=(1, 2))
