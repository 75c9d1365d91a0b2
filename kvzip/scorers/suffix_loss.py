"""What the last token would lose if the oldest pairs went: the stopping rule of ReFreeKV (arXiv 2502.16886)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from kvzip.ops.attention import soft_capped
from kvzip.ops.selection import PINNED, pin_first, pin_last
from kvzip.parts import Range
from kvzip.scorers.base import BaseScorer, Reading, Shape


class SuffixLossScorer(BaseScorer):
    """A pair's score is the loss if it and all pairs before it were evicted; never falling along a row, in [0, 1].

    The loss of a cut is the share that the norm of the last token's attention a loses: 1 - |a[i:]| / |a|. Softmax in
    float32 over prefix and context; norms are taken in each query head and averaged over those of the layer before they
    are divided. So all KV heads of a layer have the same scores, and a threshold cuts them at the same place.
    num_sinks: first tokens, prefix included, that are kept; a longer prefix counts as a whole.  rule: "code" leaves
    these out of the norms, as the authors' code does; "paper" counts them, and evicts nearly everything where they draw
    most of the attention.  whole_layers: first full-attention layers that stay whole. The last token is pinned.
    """

    needs = frozenset({"window_queries"})
    summary = "what the last token would lose, were this pair and all before it gone"
    source = "ReFreeKV, arXiv 2502.16886"
    is_query_agnostic = False

    def __init__(
        self,
        shape: Shape,
        *,
        num_sinks: Annotated[int, Range(0)] = 4,
        rule: Literal["code", "paper"] = "code",
        whole_layers: Annotated[int, Range(0)] = 2,
    ) -> None:
        super().__init__(shape)
        self.num_sinks, self.rule, self.whole_layers = num_sinks, rule, whole_layers
        self._pinned = 0  # tokens of the context that are sinks

    @property
    def num_queries(self) -> int:
        return 1

    def watch(self, layer: int, reading: Reading) -> None:
        squares = _last_row(reading).double().square()
        first = min(max(self.num_sinks, reading.prefix_len), squares.shape[1] - 1)
        self._pinned = first - reading.prefix_len
        beside = squares[:, :first].sum(dim=1, keepdim=True) if self.rule == "paper" else 0.0
        after = squares[:, first:].flip(1).cumsum(dim=1).flip(1)  # [Hq, n]: of each suffix, the whole first
        norms = (torch.nn.functional.pad(after, (0, 1)) + beside).sqrt().mean(dim=0)
        loss = (norms[0] - norms[1:]) / norms[0].clamp_min(torch.finfo(torch.float64).tiny)
        self._scores[layer, :, self._pinned :] = loss.float().cpu()

    def scores(self) -> Tensor:
        scores = pin_last(pin_first(self._scores.clone(), self._pinned), 1)
        scores[: self.whole_layers] = PINNED
        return scores


def _last_row(reading: Reading) -> Tensor:
    """The attention that each query head of the last token pays prefix and context: [Hq, S] float32."""
    num_heads, _, head_dim = reading.query.shape
    rows = reading.query[:, -1].float().reshape(reading.keys.shape[0], -1, head_dim)
    logits = soft_capped(rows @ reading.keys.float().transpose(1, 2) * reading.scale, reading.softcap)
    return (logits.reshape(num_heads, -1) - reading.lse[:, -1:]).exp()
