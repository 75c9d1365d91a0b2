"""The one seam between kvzip and transformers: an attention function registered by name.

A cache layer's `update` may return something other than tensors; transformers hands it on untouched. Ours return a
`View`, which knows what the queries of this call attend to; everything else follows from there. With an ordinary cache
the function is transformers' own `sdpa`, so a wrapped model still is the model it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from kvzip.backends import Backend
from kvzip.context import RaggedLayer
from kvzip.errors import ModelError
from kvzip.fetch.resident import Resident
from kvzip.ops.attention import merge

ATTENTION_NAME = "kvzip"
UNSUPPORTED = ("s_aux", "position_bias", "head_mask")


@dataclass(frozen=True)
class Call:
    """What the model says of one attention call.

    mask: bool [B, 1, T, S_tail] over the tail, or None = causal.  position_ids: [B or 1, T], or None = the tail index.
    window: the model's sliding window in tokens, or None.
    """

    scale: float
    softcap: float | None = None
    mask: Tensor | None = None
    position_ids: Tensor | None = None
    window: int | None = None


class View:
    """What `update` returns in place of tensors: the keys that the queries of this call may see.

    Subclasses say how. `keys` and `values` are the dense tail [B, Hkv, S_tail, D] that ends with the new tokens.
    """

    def __init__(self, backend: Backend, keys: Tensor, values: Tensor) -> None:
        self.backend, self.keys, self.values = backend, keys, values

    def attend(self, query: Tensor, call: Call) -> Tensor:
        """query: [B, Hq, T, D] -> [B, Hq, T, D]."""
        out, lse = self.attend_tail(query, call)
        return self.merge_before(query, call, out, lse)

    def attend_tail(self, query: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        causal = call.mask is None and query.shape[2] > 1
        return self.backend.attend(
            query,
            self.keys,
            self.values,
            scale=call.scale,
            mask=call.mask,
            is_causal=causal,
            softcap=call.softcap,
        )

    def merge_before(self, query: Tensor, call: Call, out: Tensor, lse: Tensor) -> Tensor:
        """The outputs over the tail, joined by what stands before it."""
        return out


class DenseView(View):
    """A tail behind dense keys [1, Hkv, S, D] that all of its queries see: a prefill block behind the blocks before."""

    def __init__(
        self, backend: Backend, keys: Tensor, values: Tensor, before_keys: Tensor, before_values: Tensor
    ) -> None:
        super().__init__(backend, keys, values)
        self.before_keys, self.before_values = before_keys, before_values

    def merge_before(self, query: Tensor, call: Call, out: Tensor, lse: Tensor) -> Tensor:
        return self.merged(query, call, out, lse)[0]

    def merged(self, query: Tensor, call: Call, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and log-sum-exps over all keys."""
        if self.before_keys.shape[2] == 0:
            return out, lse
        before = self.backend.attend(
            query, self.before_keys, self.before_values, scale=call.scale, softcap=call.softcap
        )
        return merge(out, lse, *before)


class SlidingView(View):
    """A tail behind the last tokens of a sliding window.

    before_*: [1, Hkv, n, D], the n tokens that end right before position `start`.  first: index of the first new
    token in the tail, counted from `start`; used where the model gives no position ids.
    """

    def __init__(
        self,
        backend: Backend,
        keys: Tensor,
        values: Tensor,
        before: tuple[Tensor, Tensor],
        window: int,
        start: int,
        first: int,
    ) -> None:
        super().__init__(backend, keys, values)
        self.before, self.window, self.start, self.first = before, window, start, first

    def merge_before(self, query: Tensor, call: Call, out: Tensor, lse: Tensor) -> Tensor:
        distance = self._distance(query, call)
        num_before = self.before[0].shape[2]
        reach = self.window - 1 - distance  # [B or 1, T]: how many of the tokens before `start` a query still sees
        visible = num_before if call.mask is not None else min(num_before, self.window - 1 - self.first)
        if visible <= 0:
            return out
        keys, values = (t[:, :, num_before - visible :].expand(query.shape[0], -1, -1, -1) for t in self.before)
        mask = torch.arange(visible, 0, -1, device=query.device) <= reach.unsqueeze(-1)
        before = self.backend.attend(
            query, keys, values, scale=call.scale, mask=mask.unsqueeze(1), softcap=call.softcap
        )
        return merge(out, lse, *before)[0]

    def _distance(self, query: Tensor, call: Call) -> Tensor:
        """[B or 1, T]: the position of each query, counted from `start`."""
        if call.position_ids is not None:
            return call.position_ids - self.start
        return torch.arange(query.shape[2], device=query.device).unsqueeze(0) + self.first


class RaggedView(View):
    """A tail behind the kept pairs of a compressed full-attention layer, shared by all rows of the batch."""

    def __init__(self, backend: Backend, keys: Tensor, values: Tensor, layer: RaggedLayer) -> None:
        super().__init__(backend, keys, values)
        self.layer = layer

    def attend(self, query: Tensor, call: Call) -> Tensor:
        if call.mask is None and query.shape[0] == query.shape[2] == 1:  # one token, which sees the whole tail
            return self.backend.decode(
                query, self.layer, self.keys, self.values, scale=call.scale, softcap=call.softcap
            )
        return super().attend(query, call)

    def merge_before(self, query: Tensor, call: Call, out: Tensor, lse: Tensor) -> Tensor:
        before = self.backend.attend_ragged(query, self.layer, scale=call.scale, softcap=call.softcap)
        return merge(out, lse, *before)[0]


class FetchView(View):
    """A tail behind a layer whose pairs stay in a file: each query sees what it fetches."""

    def __init__(self, backend: Backend, keys: Tensor, values: Tensor, resident: Resident) -> None:
        super().__init__(backend, keys, values)
        self.resident = resident

    def attend(self, query: Tensor, call: Call) -> Tensor:
        if call.mask is None and query.shape[0] == query.shape[2] == 1:
            (layer,) = self.resident.fetch(query[:, :, 0])
            return self.backend.decode(query, layer, self.keys, self.values, scale=call.scale, softcap=call.softcap)
        return super().attend(query, call)

    def merge_before(self, query: Tensor, call: Call, out: Tensor, lse: Tensor) -> Tensor:
        batch, num_heads, q_len, head_dim = query.shape
        rows = query.transpose(1, 2).reshape(-1, num_heads, head_dim)
        parts = [
            self.backend.attend_ragged(
                row.reshape(1, num_heads, 1, head_dim), layer, scale=call.scale, softcap=call.softcap
            )
            for row, layer in zip(rows, self.resident.fetch(rows), strict=True)
        ]
        outs, lses = (
            torch.cat(found).reshape(batch, q_len, num_heads, -1).transpose(1, 2) for found in zip(*parts, strict=True)
        )
        return merge(out, lse, outs, lses.squeeze(-1))[0]


class BlankLayer(CacheLayerMixin):
    """A layer that looks empty to transformers, so that masks cover the new tokens alone."""

    is_compileable = False
    is_sliding = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


def kvzip_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | View,
    value: Tensor | View,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls. Returns ([B, T, Hq, D], None).

    Raises ModelError for attention sinks and position biases, which only some models have.
    """
    if isinstance(key, View):
        if extra := [name for name in UNSUPPORTED if kwargs.get(name) is not None]:
            raise ModelError(f"its attention has {extra[0]}, which kvzip does not compute")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = key.attend(query, Call(scale, softcap, attention_mask, position_ids, sliding_window))
        return out.transpose(1, 2).contiguous(), None
    if softcap is not None:
        return _attend_with_cap(query, key, value, attention_mask, scaling, softcap)
    out, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return out, None


def _attend_with_cap(
    query: Tensor, key: Tensor, value: Any, mask: Tensor | None, scaling: float | None, softcap: float
) -> tuple[Tensor, None]:
    """Plain attention with a soft cap, which `sdpa` lacks."""
    from kvzip.backends.reference import ReferenceBackend

    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = mask is None and query.shape[2] > 1
    out, _ = ReferenceBackend().attend(query, key, value, scale=scale, mask=mask, is_causal=causal, softcap=softcap)
    return out.transpose(1, 2).contiguous(), None


def register() -> None:
    """Make `attn_implementation="kvzip"` known to transformers. Called when a model is loaded or wrapped."""
    AttentionInterface.register(ATTENTION_NAME, kvzip_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
