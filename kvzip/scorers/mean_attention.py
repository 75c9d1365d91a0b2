"""Mean attention of the last tokens, in shares of an even one (LeanKV, arXiv 2412.03131)."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from kvzip.ops.attention import causal_columns
from kvzip.ops.selection import pin_last
from kvzip.parts import Range
from kvzip.scorers.base import BaseScorer, Reading, Shape


class MeanAttentionScorer(BaseScorer):
    """A pair's score is the mean attention it gets from the last tokens that follow it, times the tokens there are.

    So 1 is what a pair would get if attention were even, and a threshold means the same in a text of any length. The
    mean is over those of the last `window_size` tokens that come after the pair, the largest over the query heads of a
    KV head; softmax in float32 over prefix and context.  window_size: of a shorter context, all of it; these pairs are
    pinned, the last token first.  No score is 0, as no attention is but in rounding: a threshold of 0 keeps all.
    """

    needs = frozenset({"window_queries"})
    summary = "mean attention of the last tokens, in shares of an even one"
    source = "LeanKV, arXiv 2412.03131"
    is_query_agnostic = False

    def __init__(self, shape: Shape, *, window_size: Annotated[int, Range(1)] = 64) -> None:
        super().__init__(shape)
        self.window_size = min(window_size, shape[2])
        self._sums: dict[int, Tensor] = {}  # [G, Hkv, S] of each layer
        self._total = shape[2]

    @property
    def num_queries(self) -> int:
        return self.window_size

    def watch(self, layer: int, reading: Reading) -> None:
        num_kv_heads, seen = reading.keys.shape[0], reading.keys.shape[1] - reading.prefix_len
        self._total = self.shape[2] + reading.prefix_len
        queries, lses = (
            t.reshape(num_kv_heads, -1, *t.shape[1:]).transpose(0, 1) for t in (reading.query, reading.lse)
        )
        sums = self._sums.setdefault(layer, torch.zeros(len(queries), *self.shape[1:]))
        for member, query, lse in zip(sums, queries, lses, strict=True):
            got = causal_columns(query, reading.keys, lse, scale=reading.scale, softcap=reading.softcap)
            member[:, :seen] += got[:, reading.prefix_len :].cpu()

    def scores(self) -> Tensor:
        for layer, sums in self._sums.items():
            self._scores[layer] = sums.amax(dim=0) * (self._total / self.window_size)
        return pin_last(self._scores.clamp_min(torch.finfo(torch.float32).tiny), self.window_size)
