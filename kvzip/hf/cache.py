"""A transformers Cache that holds only what a question and its answer add; the context joins inside attention.

To transformers a new `SessionCache` is empty: lengths, positions and masks count the tail alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from kvzip.backends import Backend
from kvzip.context import RaggedContext, RaggedLayer
from kvzip.errors import InputError
from kvzip.fetch.resident import FetchStats, Resident
from kvzip.hf.seam import FetchView, RaggedView, SlidingView, View

MIN_CAPACITY = 64


class TailLayer(CacheLayerMixin):
    """The dense tail of one layer [B, Hkv, S_tail, D], in a buffer that grows by doubling."""

    is_compileable = False
    is_croppable = True

    def __init__(self, context: RaggedLayer, backend: Backend) -> None:
        self.context, self.backend = context, backend
        self.is_sliding = context.window is not None
        self.resident = None if context.clusters is None else Resident(context)
        self.length = 0
        self._buffers: tuple[Tensor, Tensor] | None = None

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        return self._buffers is not None

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        return None if self._buffers is None else self._buffers[0][:, :, : self.length]

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        return None if self._buffers is None else self._buffers[1][:, :, : self.length]

    @property
    def nbytes(self) -> int:
        """Bytes allocated for the tail, the context left out."""
        return 0 if self._buffers is None else sum(b.nbytes for b in self._buffers)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self._buffers = (_grown(key_states, 0, MIN_CAPACITY), _grown(value_states, 0, MIN_CAPACITY))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[View, View]:  # type: ignore[override]
        """Append [B, Hkv, T, D] to the tail; the View stands for keys and values alike."""
        first, self.length = self.length, self.length + key_states.shape[2]
        if self._buffers is None:
            self.lazy_initialization(key_states, value_states)
        keys, values = self._write(key_states, first, 0), self._write(value_states, first, 1)
        view = self._view(keys, values, first)
        return view, view

    def _write(self, states: Tensor, first: int, which: int) -> Tensor:
        assert self._buffers is not None
        buffer = self._buffers[which]
        if self.length > buffer.shape[2]:
            buffer = _grown(buffer, first, max(self.length, 2 * buffer.shape[2]))
            self._buffers = (buffer, self._buffers[1]) if which == 0 else (self._buffers[0], buffer)
        buffer[:, :, first : self.length] = states
        return buffer[:, :, : self.length]

    def _view(self, keys: Tensor, values: Tensor, first: int) -> View:
        layer = self.context
        if self.resident is not None:
            return FetchView(self.backend, keys, values, self.resident)
        if layer.window is None:
            return RaggedView(self.backend, keys, values, layer)
        low = first - min(first, layer.window - 1)
        before = tuple(t.reshape(1, layer.num_kv_heads, -1, t.shape[-1]) for t in layer.dense())
        return SlidingView(
            self.backend, keys[:, :, low:], values[:, :, low:], (before[0], before[1]), layer.window, 0, first
        )

    def shared_view(self, num_new: int) -> View:
        """What the last `num_new` tokens see in another layer that uses this one's keys and values."""
        assert self.keys is not None and self.values is not None
        return self._view(self.keys, self.values, self.length - num_new)

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys that the next `query_length` queries see in the tail, index of the first of them)."""
        window = self.context.window
        visible = self.length if window is None else min(self.length, window - 1)
        return visible + query_length, self.length - visible

    def reset(self) -> None:
        self.length, self._buffers = 0, None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens (a negative number, as in transformers)."""
        if tokens_to_remove > 0 or -tokens_to_remove > self.length:
            raise InputError(f"crop({tokens_to_remove}): give 0 to -{self.length}, the tokens to forget")
        self.length += tokens_to_remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self._buffers is not None:
            self._buffers = tuple(b.index_select(0, indices.to(b.device)) for b in self._buffers)  # type: ignore[assignment]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._buffers is not None:
            self._buffers = tuple(b.repeat_interleave(repeats, dim=0) for b in self._buffers)  # type: ignore[assignment]


class SharedTailLayer(CacheLayerMixin):
    """A layer without a tail of its own: its queries see what those of its source, a lower layer, see."""

    is_compileable = False
    is_croppable = True
    is_sliding = False
    nbytes = 0
    resident: Resident | None = None  # what its queries fetch is counted by the source

    def __init__(self, source: TailLayer) -> None:
        self.source = source

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        return self.source.is_initialized

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        return self.source.keys

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        return self.source.values

    @property
    def context(self) -> RaggedLayer:
        return self.source.context

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[View, View]:  # type: ignore[override]
        view = self.source.shared_view(key_states.shape[2])
        return view, view

    def get_seq_length(self) -> int:
        return self.source.get_seq_length()

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.source.get_mask_sizes(query_length)

    # What changes a tail is done once, by the source.

    def reset(self) -> None: ...

    def crop(self, tokens_to_remove: int) -> None: ...

    def reorder_cache(self, beam_idx: Tensor) -> None: ...

    def batch_select_indices(self, indices: Tensor) -> None: ...

    def batch_repeat_interleave(self, repeats: int) -> None: ...


class SessionCache(Cache):
    """What `model.generate(question_ids, past_key_values=...)` takes: a compressed context and an empty tail.

    context: shared, never written.  Rows of a batch share it; beams too. One cache serves one generation at a time.
    """

    def __init__(self, context: RaggedContext, backend: Backend) -> None:
        self.context = context
        layers: list[Any] = []
        for index, layer in enumerate(context.layers):
            source = context.shared.get(index)
            layers.append(TailLayer(layer, backend) if source is None else SharedTailLayer(layers[source]))
        super().__init__(layers=layers)

    @property
    def tail_len(self) -> int:
        """Tokens in the tail."""
        return int(self.layers[0].get_seq_length())

    @property
    def tail_nbytes(self) -> int:
        """Bytes allocated for the tail."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def fetch_stats(self) -> FetchStats | None:
        """What was fetched so far, over all layers; None where the context is in memory."""
        stats = [layer.resident.stats for layer in self.layers if layer.resident is not None]
        if not stats:
            return None
        total = (sum(getattr(s, name) for s in stats) for name in ("num_pairs", "num_hits", "nbytes"))
        return FetchStats(stats[0].num_steps, *total)

    def rewind(self, tail_len: int) -> None:
        """Forget everything after the first `tail_len` tokens of the tail; costs nothing."""
        self.crop(tail_len - self.tail_len)


def _grown(tensor: Tensor, used: int, capacity: int) -> Tensor:
    batch, num_kv_heads, length, head_dim = tensor.shape
    new = torch.empty(batch, num_kv_heads, max(capacity, length), head_dim, dtype=tensor.dtype, device=tensor.device)
    new[:, :, :used] = tensor[:, :, :used]
    return new
