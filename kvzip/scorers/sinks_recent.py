"""The first tokens and the last ones (StreamingLLM, arXiv 2309.17453)."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from kvzip.ops.selection import sinks_then_recent
from kvzip.parts import Range
from kvzip.scorers.base import BaseScorer, Shape


class SinksRecentScorer(BaseScorer):
    """A pair's score is its place in the context, in [0, 1); the first `num_sinks` have 1.

    The prefix, which always stays, is not counted. Keys keep their rotation, as in every method here.
    """

    summary = "the first tokens and the last ones"
    source = "StreamingLLM, arXiv 2309.17453"

    def __init__(self, shape: Shape, *, num_sinks: Annotated[int, Range(0)] = 4) -> None:
        super().__init__(shape)
        self.num_sinks = num_sinks

    def scores(self) -> Tensor:
        return sinks_then_recent(self.shape[2], self.num_sinks).expand(self.shape).contiguous()
