"""Attention accumulated over all queries of the context (H2O, arXiv 2306.14048)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from kvzip.errors import InputError
from kvzip.ops.attention import causal_columns
from kvzip.ops.selection import pin_last
from kvzip.parts import Range
from kvzip.scorers.base import BaseScorer, Reading, Shape


class AccumulatedScorer(BaseScorer):
    """A pair's score is the attention it gets from all queries of the context, itself included, while that is read.

    reduce: "sum" over the queries (H2O), "mean" over those that see the pair, both averaged over the query heads of a
    KV head, or "max" over queries and query heads (the KVzip paper's variant).  num_recent: last tokens, pinned.
    Softmax in float32 over prefix and context. The sum over prefix and context is the number of queries.
    """

    needs = frozenset({"prefill_queries"})
    summary = "attention accumulated over all tokens of the text; the last tokens stay"
    source = "H2O, arXiv 2306.14048"
    is_query_agnostic = False

    def __init__(
        self,
        shape: Shape,
        *,
        reduce: Literal["sum", "mean", "max"] = "sum",
        num_recent: Annotated[int, Range(0)] = 32,
    ) -> None:
        super().__init__(shape)
        if num_recent > shape[2]:
            raise InputError(
                f"num_recent {num_recent} is more than the context's {shape[2]} tokens: "
                f"give num_recent={shape[2]} or less"
            )
        self.reduce, self.num_recent = reduce, num_recent

    def watch(self, layer: int, reading: Reading) -> None:
        how: Literal["sum", "max"] = "max" if self.reduce == "max" else "sum"
        got = causal_columns(
            reading.query, reading.keys, reading.lse, scale=reading.scale, softcap=reading.softcap, reduce=how
        )
        got = got[:, reading.prefix_len :].cpu()
        so_far = self._scores[layer, :, : got.shape[1]]
        if how == "max":
            torch.maximum(so_far, got, out=so_far)
        else:
            so_far += got / (reading.query.shape[0] // reading.keys.shape[0])

    def scores(self) -> Tensor:
        scores = self._scores.clone()
        if self.reduce == "mean":
            scores /= torch.arange(self.shape[2], 0, -1)  # a token is seen by itself and all that follow
        return pin_last(scores, self.num_recent)
