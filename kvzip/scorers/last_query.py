"""Attention of the last query alone (TOVA, arXiv 2401.06104)."""

from __future__ import annotations

from torch import Tensor

from kvzip.ops.attention import causal_columns
from kvzip.ops.selection import pin_last
from kvzip.scorers.base import BaseScorer, Reading


class LastQueryScorer(BaseScorer):
    """A pair's score is the attention that the last token pays it, averaged over all query heads of the layer.

    In [0, 1] and the same for every KV head of a layer. The last token is pinned. Applied once, at the end of the
    context, where the paper applies it at every step.
    """

    needs = frozenset({"window_queries"})
    summary = "attention of the last token, averaged over the heads of a layer"
    source = "TOVA, arXiv 2401.06104"
    is_query_agnostic = False

    @property
    def num_queries(self) -> int:
        return 1

    def watch(self, layer: int, reading: Reading) -> None:
        got = causal_columns(reading.query, reading.keys, reading.lse, scale=reading.scale, softcap=reading.softcap)
        self._scores[layer] = got[:, reading.prefix_len :].sum(dim=0).cpu() / reading.query.shape[0]

    def scores(self) -> Tensor:
        return pin_last(self._scores.clone(), 1)
