"""Attention of an observation window at the end of the context (SnapKV, arXiv 2404.14469)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from kvzip.errors import InputError
from kvzip.ops.attention import causal_columns
from kvzip.ops.selection import pin_last
from kvzip.parts import Range
from kvzip.scorers.base import BaseScorer, Reading, Shape


class WindowScorer(BaseScorer):
    """A pair's score is the mean attention that it gets from the last `window_size` tokens, pooled over its neighbours.

    The mean runs over the window and the query heads of a KV head, before pooling; in [0, 1]. Softmax in float32 over
    prefix and context, the model's own scale and soft cap. Pooling sees the context before the window alone, so that
    the prefix's large weights do not spill over. The window itself is pinned, the last token first.
    Defaults are those of the KVzip paper's comparison; the window is the end of the text, as no question is known.
    """

    needs = frozenset({"window_queries"})
    summary = "attention of the last tokens, pooled over neighbours"
    source = "SnapKV, arXiv 2404.14469"
    is_query_agnostic = False

    def __init__(
        self,
        shape: Shape,
        *,
        window_size: Annotated[int, Range(1)] = 32,
        kernel_size: Annotated[int, Range(1, odd=True)] = 7,
        pooling: Literal["max", "avg"] = "max",
    ) -> None:
        super().__init__(shape)
        if window_size > shape[2]:
            raise InputError(
                f"window_size {window_size} is longer than the context of {shape[2]} tokens: "
                f"give window_size={shape[2]} or less"
            )
        self.window_size, self.kernel_size, self.pooling = window_size, kernel_size, pooling

    @property
    def num_queries(self) -> int:
        return self.window_size

    def watch(self, layer: int, reading: Reading) -> None:
        groups = reading.query.shape[0] // reading.keys.shape[0]
        got = causal_columns(reading.query, reading.keys, reading.lse, scale=reading.scale, softcap=reading.softcap)
        got = got[:, reading.prefix_len :].cpu() / (groups * self.window_size)
        self._scores[layer, :, : got.shape[1]] += got

    def scores(self) -> Tensor:
        pool = max_pool1d if self.pooling == "max" else avg_pool1d
        scores = torch.zeros(self.shape)
        if num_scored := self.shape[2] - self.window_size:
            scores[..., :num_scored] = pool(
                self._scores[..., :num_scored], self.kernel_size, stride=1, padding=self.kernel_size // 2
            )
        return pin_last(scores, self.window_size)
