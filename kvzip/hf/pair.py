"""Two caches side by side, a row of a batch each: one forward pass shows both the same tokens.

The model's weights are read once for both, which is most of what a pass over few tokens costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from kvzip.hf.cache import SessionCache
from kvzip.hf.prefill import PrefillCache, behind_all, forward_rows
from kvzip.hf.seam import BlankLayer, Call, View


class PairView(View):
    """Each row of the queries sees what its own view says."""

    def __init__(self, views: Sequence[View]) -> None:
        self.views = views

    def attend(self, query: Tensor, call: Call) -> Tensor:
        rows = zip(self.views, query.chunk(len(self.views)), strict=True)
        return torch.cat([view.attend(row, _of_row(call, number)) for number, (view, row) in enumerate(rows)])


def _of_row(call: Call, row: int) -> Call:
    """The call as one row of the batch makes it."""
    mask, position_ids = (t if t is None or len(t) == 1 else t[row : row + 1] for t in (call.mask, call.position_ids))
    return replace(call, mask=mask, position_ids=position_ids)


class PairLayer(BlankLayer):
    """One layer of each cache, neither of which has a tail yet."""

    def __init__(self, layers: Sequence[CacheLayerMixin]) -> None:
        super().__init__()
        self.layers, self.is_sliding = layers, layers[0].is_sliding

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[View, View]:  # type: ignore[override]
        rows = zip(self.layers, key_states.chunk(2), value_states.chunk(2), strict=True)
        view = PairView([layer.update(keys, values, *args, **kwargs)[0] for layer, keys, values in rows])
        return view, view


def hidden_behind_both(
    model: PreTrainedModel, ids: Tensor, full: PrefillCache, compressed: SessionCache
) -> tuple[Tensor, Tensor]:
    """The final hidden states [T, E] of `ids` [T] behind a full cache, and behind an empty session of a compressed one.

    They leave nothing in the full cache; the session has them as its tail.
    """
    pair = Cache(layers=[PairLayer(layers) for layers in zip(full.layers, compressed.layers, strict=True)])
    with behind_all(full):
        first, second = forward_rows(model, ids.expand(2, -1), (full.length, 0), pair)
    return first, second
