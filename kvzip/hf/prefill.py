"""The full cache while a context is read and replayed: dense buffers filled once, in place.

Prefill appends blocks. Replay attends to everything that was read, keeps nothing of what it adds, and shows an
observer the queries that attended. What reads can be watched too, at once or by reading again over what is stored.
Positions are the true ones and are always passed to the model; to transformers the cache looks empty, so its masks
cover the new tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from kvzip.backends import Backend
from kvzip.hf.geometry import Geometry, LayerGeometry
from kvzip.hf.seam import BlankLayer, Call, DenseView, SlidingView, View
from kvzip.ops.attention import merge
from kvzip.scorers.base import Observation, Reading


@dataclass(frozen=True)
class Replay:
    """One replay pass: which part of the context it repeats, and who watches.

    prefix_len: tokens before the context.  start, end: the chunk, as positions counted from the first prefix token.
    observe: called once a full-attention layer.  last: the last layer that is observed; what comes after its attention
    is not computed.  local: the replayed tokens see prefix and chunk alone, not the rest of the context.
    """

    prefix_len: int
    start: int
    end: int
    observe: Callable[[int, Observation], None]
    last: int
    local: bool = False


@dataclass(frozen=True)
class Watch:
    """Who watches while a context is read, and from where on.

    start: position of the first token whose queries are shown.  observe: called once a full-attention layer and block.
    last: where the text is read again, the last layer that is watched; what comes after its attention is not computed.
    with_outputs: show values and outputs too.
    """

    prefix_len: int
    start: int
    observe: Callable[[int, Reading], None]
    last: int | None = None
    with_outputs: bool = False


class _AllObserved(Exception):
    """Ends a pass in the middle of the model: nothing after this point is needed."""


class WatchedView(DenseView):
    """A block of the context behind what was read before it, shown to whoever watches."""

    def __init__(self, backend: Backend, tail: tuple[Tensor, Tensor], layer: PrefillLayer, watch: Watch) -> None:
        end = layer.length
        super().__init__(backend, *tail, *layer.read(slice(0, end - tail[0].shape[2])))
        self.layer, self.watch, self.seen = layer, watch, layer.read(slice(0, end))[0][0]

    def attend(self, query: Tensor, call: Call) -> Tensor:
        out, lse = self.merged(query, call, *self.attend_tail(query, call))
        skip = max(0, self.watch.start - (self.seen.shape[1] - query.shape[2]))
        if skip < query.shape[2]:
            reading = Reading(
                query=query[0, :, skip:],
                keys=self.seen,
                lse=lse[0, :, skip:],
                prefix_len=self.watch.prefix_len,
                scale=call.scale,
                softcap=call.softcap,
                inv_freq=self.layer.geometry.inv_freq,
                values=self.values[0, :, skip:] if self.watch.with_outputs else None,
                outputs=out[0, :, skip:] if self.watch.with_outputs else None,
            )
            self.watch.observe(self.layer.index, reading)
        if self.layer.index == self.watch.last:
            raise _AllObserved
        return out


class ReplayView(View):
    """Replayed tokens behind the whole context, or behind prefix and chunk where the replay is local."""

    def __init__(self, backend: Backend, tail: tuple[Tensor, Tensor], layer: PrefillLayer, replay: Replay) -> None:
        super().__init__(backend, *tail)
        self.layer, self.replay = layer, replay

    def attend(self, query: Tensor, call: Call) -> Tensor:
        return self._attend_others(query, call, self._attend_chunk(query, call))

    def _attend_chunk(self, query: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """Outputs and log-sum-exps over prefix, chunk and replayed tokens."""
        rp, seen = self.replay, self.attend_tail(query, call)
        if rp.start == rp.prefix_len:
            return self._merge(query, call, slice(0, rp.end), seen)
        seen = self._merge(query, call, slice(0, rp.prefix_len), seen)
        return self._merge(query, call, slice(rp.start, rp.end), seen)

    def _attend_others(self, query: Tensor, call: Call, seen: tuple[Tensor, Tensor]) -> Tensor:
        """The outputs, joined by the rest of the context unless the replay is local."""
        rp = self.replay
        if rp.local:
            return seen[0]
        seen = self._merge(query, call, slice(rp.prefix_len, rp.start), seen)
        return self._merge(query, call, slice(rp.end, self.layer.length), seen)[0]

    def _merge(self, query: Tensor, call: Call, part: slice, so_far: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if part.start == part.stop:
            return so_far
        keys, values = self.layer.read(part)
        return merge(*so_far, *self.backend.attend(query, keys, values, scale=call.scale, softcap=call.softcap))


class ObservedReplayView(ReplayView):
    """The same, shown to whoever observes: in parts, so that the softmax over prefix + chunk + replay is known."""

    def attend(self, query: Tensor, call: Call) -> Tensor:
        seen = self._attend_chunk(query, call)
        self._show(query, call, *seen)
        if self.layer.index == self.replay.last:
            raise _AllObserved
        return self._attend_others(query, call, seen)

    def _show(self, query: Tensor, call: Call, outputs: Tensor, lse: Tensor) -> None:
        rp = self.replay
        observation = Observation(
            query=query[0],
            prefix_keys=self.layer.read(slice(0, rp.prefix_len))[0][0],
            chunk_keys=self.layer.read(slice(rp.start, rp.end))[0][0],
            replay_keys=self.keys[0],
            lse=lse[0],
            outputs=outputs[0],
            scale=call.scale,
            softcap=call.softcap,
            chunk=slice(rp.start - rp.prefix_len, rp.end - rp.prefix_len),
            chunk_values=self.layer.read(slice(rp.start, rp.end))[1][0],
        )
        rp.observe(self.layer.index, observation)


class PrefillLayer(BlankLayer):
    """All keys and values of one full-attention layer, in buffers [1, Hkv, capacity, D] made at the first block."""

    def __init__(self, index: int, geometry: LayerGeometry, capacity: int, backend: Backend) -> None:
        super().__init__()
        self.index, self.geometry, self.capacity, self.backend = index, geometry, capacity, backend
        self.length = 0
        self.is_read_again = False
        self.replay: Replay | None = None
        self.replayed: tuple[Tensor, Tensor] | None = None  # keys and values of the tokens that are replayed
        self.watch: Watch | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, num_kv_heads, _, head_dim = key_states.shape
        self.keys, self.values = (
            torch.empty(batch, num_kv_heads, self.capacity, head_dim, dtype=s.dtype, device=s.device)
            for s in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[View, View]:  # type: ignore[override]
        if self.replay is not None:
            self.replayed = key_states, value_states
            view: View = ObservedReplayView(self.backend, self.replayed, self, self.replay)
            return view, view
        before = self._append(key_states, value_states)
        if self.watch is not None:
            view = WatchedView(self.backend, (key_states, value_states), self, self.watch)
        else:
            view = DenseView(self.backend, key_states, value_states, *before)
        return view, view

    def _append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Store a block; what stood before it comes back."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.read(slice(0, self.length))
        end = self.length + key_states.shape[2]
        if not self.is_read_again:
            self.keys[:, :, self.length : end] = key_states
            self.values[:, :, self.length : end] = value_states
        self.length = end
        return before

    def shared_view(self, num_new: int) -> View:
        """What the last `num_new` tokens see in another layer that uses this one's keys and values; nobody watches."""
        if self.replay is not None:
            assert self.replayed is not None
            return ReplayView(self.backend, self.replayed, self, self.replay)
        first = self.length - num_new
        return DenseView(self.backend, *self.read(slice(first, self.length)), *self.read(slice(0, first)))

    def read(self, part: slice) -> tuple[Tensor, Tensor]:
        """Keys and values of these positions [1, Hkv, n, D], as views."""
        return self.keys[:, :, part], self.values[:, :, part]

    def rewind(self) -> None:
        """Begin to read again: what is stored stays, and is the same as what comes."""
        self.length, self.is_read_again = 0, True

    def release(self) -> None:
        """Give the memory back."""
        self.keys = self.values = torch.empty(0)
        self.is_initialized, self.length = False, 0


class SlidingPrefillLayer(PrefillLayer):
    """The last `window - 1` tokens of a sliding-window layer: all that a later token can see."""

    is_sliding = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[View, View]:  # type: ignore[override]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        window = self.geometry.window
        assert window is not None
        before = (self.keys, self.values)
        view = SlidingView(self.backend, key_states, value_states, before, window, self.length, 0)
        if self.replay is None:
            self.keys = _last(self.keys, key_states, window - 1)
            self.values = _last(self.values, value_states, window - 1)
            self.length += key_states.shape[2]
        return view, view

    def rewind(self) -> None:
        """Begin to read again, with an empty window."""
        self.length, self.is_initialized = 0, False


class SharedPrefillLayer(CacheLayerMixin):
    """A layer that stores nothing: its queries see the keys and values of its source, a lower layer.

    The model computes keys and values for it all the same; they are not looked at.
    """

    is_compileable = False
    is_sliding = False

    def __init__(self, source: PrefillLayer) -> None:
        super().__init__()
        self.source = source

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[View, View]:  # type: ignore[override]
        view = self.source.shared_view(key_states.shape[2])
        return view, view

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.source.get_mask_sizes(query_length)

    def get_seq_length(self) -> int:
        return self.source.get_seq_length()

    def get_max_length(self) -> int:
        return -1


class PrefillCache(Cache):
    """The full cache of one context, batch 1.  capacity: tokens of prefix and context.

    stored: the layers that hold something, by index; the others are shared.
    """

    def __init__(self, geometry: Geometry, capacity: int, backend: Backend) -> None:
        self.stored: dict[int, PrefillLayer] = {
            i: (PrefillLayer if layer.window is None else SlidingPrefillLayer)(i, layer, capacity, backend)
            for i, layer in enumerate(geometry.layers)
            if i not in geometry.shared
        }
        layers = [
            SharedPrefillLayer(self.stored[geometry.shared[i]]) if i in geometry.shared else self.stored[i]
            for i in range(len(geometry.layers))
        ]
        super().__init__(layers=layers)

    @property
    def length(self) -> int:
        """Tokens read so far."""
        return int(self.layers[0].length)

    def release(self) -> None:
        """Give the memory of all layers back."""
        for layer in self.stored.values():
            layer.release()

    def set_replay(self, replay: Replay | None) -> None:
        """Attend without appending, shown to `replay.observe`; None goes back to appending."""
        for layer in self.stored.values():
            layer.replay, layer.replayed = replay, None

    def set_watch(self, watch: Watch | None) -> None:
        """Show the queries of what is read to `watch.observe`; None shows them to nobody."""
        for layer in self.stored.values():
            layer.watch = watch

    @contextmanager
    def read_again(self) -> Iterator[None]:
        """Blocks that come meanwhile are read from the first token on; afterwards all is as it was."""
        layers = list(self.stored.values())
        before = [(layer.keys, layer.values, layer.length) for layer in layers]
        try:
            for layer in layers:
                layer.rewind()
            yield
        finally:
            for layer, (keys, values, length) in zip(layers, before, strict=True):
                layer.keys, layer.values, layer.length = keys, values, length
                layer.is_initialized, layer.is_read_again = True, False


def replay(model: PreTrainedModel, ids: Tensor, cache: PrefillCache, how: Replay) -> None:
    """Run the decoder over `ids` [T] behind the whole context, up to the last layer that is observed."""
    cache.set_replay(how)
    try:
        forward_at(model, ids, cache.length, cache)
    except _AllObserved:
        pass
    finally:
        cache.set_replay(None)


@contextmanager
def behind_all(cache: PrefillCache) -> Iterator[None]:
    """Tokens that are run meanwhile stand behind the whole context, and leave nothing behind."""
    cache.set_replay(Replay(0, 0, cache.length, lambda layer, seen: None, last=-1))
    try:
        yield
    finally:
        cache.set_replay(None)


def hidden_behind(model: PreTrainedModel, ids: Tensor, cache: PrefillCache) -> Tensor:
    """The final hidden states [T, E] of `ids` [T] behind the whole context; they leave nothing behind."""
    with behind_all(cache):
        return forward_at(model, ids, cache.length, cache)


def read_watched(model: PreTrainedModel, ids: Tensor, position: int, cache: PrefillCache) -> None:
    """As `forward_at`, up to the last layer that is watched."""
    with suppress(_AllObserved):
        forward_at(model, ids, position, cache)


def forward_at(model: PreTrainedModel, ids: Tensor, position: int, cache: Cache) -> Tensor:
    """Run the decoder, without the language-model head, over `ids` [T] whose first token has that position.

    Returns the final hidden states [T, E].
    """
    return forward_rows(model, ids.unsqueeze(0), (position,), cache)[0]


def forward_rows(model: PreTrainedModel, ids: Tensor, positions: Sequence[int], cache: Cache) -> Tensor:
    """The same of rows `ids` [B, T] in one pass, whose first tokens have these positions: [B, T, E]."""
    first = torch.tensor(positions, device=model.device).unsqueeze(1)
    outputs = model.get_decoder()(
        input_ids=ids.to(model.device),
        position_ids=first + torch.arange(ids.shape[1], device=model.device),
        past_key_values=cache,
        use_cache=True,
    )
    hidden: Tensor = outputs.last_hidden_state
    return hidden


def _last(old: Tensor, new: Tensor, count: int) -> Tensor:
    """The last `count` tokens of both, in memory of their own."""
    keep_old = max(0, min(old.shape[2], count - new.shape[2]))
    return torch.cat([old[:, :, old.shape[2] - keep_old :], new[:, :, -count:]], dim=2)
