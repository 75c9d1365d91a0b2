"""Prefill, score, select, pack: how a text becomes a compressed context. Read this file first.

    FullContext.prefill ──► FullContext.score ──► select ──► FullContext.evict ──► RaggedContext

One `FullContext` serves any number of methods and keep ratios.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvzip.backends import Backend
from kvzip.budget import Amounts
from kvzip.chunks import CHUNK_LEN, Asking, RepeatPrompts, chunk_slices, fit_chunk_len
from kvzip.context import ContextInfo, RaggedContext, RaggedLayer
from kvzip.fetch.base import BaseFetch
from kvzip.hf.geometry import Geometry
from kvzip.hf.prefill import PrefillCache, Replay, Watch, read_watched, replay
from kvzip.hf.projections import attention_inputs, entering_streams, input_norms, output_weights
from kvzip.ops.ragged import cu_seqlens_of, pack, pack_bits
from kvzip.ops.rope import shift_keys
from kvzip.profilers import Profiler
from kvzip.progress import Progress, silent
from kvzip.replayed import ReplayedQueries
from kvzip.scorers import get_scorer
from kvzip.scorers.base import WHILE_READING, BaseScorer, Observation, Observer, Profile, Reading, Shape, Together
from kvzip.selecting import Selection
from kvzip.transforms.base import BaseTransform, Evicted

PREFILL_BLOCK = 1024  # tokens of one forward pass while reading


@dataclass(frozen=True)
class Engine:
    """What reading, replaying and measuring need of a model.  asking: None = no questions are made."""

    model: PreTrainedModel
    geometry: Geometry
    backend: Backend
    prompts: RepeatPrompts
    asking: Asking | None = None


class FullContext:
    """The full cache of one text, and what was seen of it. Fill it with `prefill`.

    prefix_ids: [P], context_ids: [S], int64 on the CPU.
    """

    def __init__(self, engine: Engine, prefix_ids: Tensor, context_ids: Tensor) -> None:
        self.engine, self.prefix_ids, self.context_ids = engine, prefix_ids, context_ids
        self.cache = PrefillCache(engine.geometry, prefix_ids.numel() + context_ids.numel(), engine.backend)
        self.prefill_s = self._watch_s = self._watched_s = 0.0
        self._watched: tuple[str, BaseScorer] | None = None

    @property
    def length(self) -> int:
        """Tokens of prefix and context."""
        return self.prefix_ids.numel() + self.context_ids.numel()

    @property
    def _shape(self) -> Shape:
        return *self.engine.geometry.full_shape, self.context_ids.numel()

    def fit_chunk_len(self, chunk_len: int = CHUNK_LEN) -> int:
        """`kvzip.chunks.fit_chunk_len` of this context and model. Raises ContextLengthError."""
        lengths, engine = (self.prefix_ids.numel(), self.context_ids.numel()), self.engine
        return fit_chunk_len(*lengths, engine.prompts, chunk_len, engine.geometry.max_positions)

    def make_scorer(self, name: str) -> BaseScorer:
        """A new scorer for this context, named with its options. Raises UnknownNameError or InputError."""
        scorer = get_scorer(name, *self._shape)
        if scorer.needs & {"hidden_states", "attention_outputs"}:
            output_weights(self.engine.model, self.engine.geometry)  # refuse before any work
        return scorer

    @torch.inference_mode()
    def prefill(
        self,
        block_len: int = PREFILL_BLOCK,
        progress: Progress = silent,
        scorer_name: str | None = None,
        profile: Profile | None = None,
    ) -> None:
        """Read what was not read yet of prefix and context, `block_len` tokens a forward pass.

        scorer_name: shown the queries on the way, where it needs them, so that `score` by it reads nothing again. Its
        time is no part of `prefill_s`.  profile: of the model, where the scorer needs it.
        Raises as `make_scorer`, before any work.
        """
        started, watch_s = time.perf_counter(), self._watch_s
        with ExitStack() as stack:
            if scorer_name is not None and not self.cache.length:
                scorer = self.make_scorer(scorer_name)
                if scorer.needs & WHILE_READING:
                    if profile is not None:
                        scorer.learn(profile)
                    self._watched = scorer_name, scorer
                    stack.enter_context(self._watching(scorer))
            self._read(self.cache.length, block_len, "prefill", progress)
        self._watched_s += self._watch_s - watch_s
        self.prefill_s += time.perf_counter() - started - (self._watch_s - watch_s)

    def watched_s(self, scorer_name: str) -> float:
        """Seconds that the scorer of that name took while the text was read."""
        return self._watched_s if self._watched is not None and self._watched[0] == scorer_name else 0.0

    def _read(self, first: int, block_len: int, stage: str, progress: Progress) -> None:
        """Run the model over the tokens from position `first` on."""
        ids = torch.cat([self.prefix_ids, self.context_ids])
        progress(stage, first, self.length)
        for start in range(first, self.length, block_len):
            block = ids[start : start + block_len]
            read_watched(self.engine.model, block, start, self.cache)
            progress(stage, start + block.numel(), self.length)

    @contextmanager
    def _watching(self, observer: Observer, last: int | None = None) -> Iterator[None]:
        """Meanwhile `observer` is shown the queries of the context's last tokens, as many as it wants, by the clock.

        last: as in `Watch`.
        """
        model, geometry = self.engine.model, self.engine.geometry
        with ExitStack() as stack:
            streams: dict[int, Tensor] = {}
            weights: dict[int, Tensor] = {}
            inputs: dict[int, Tensor] = {}
            with_outputs = "attention_outputs" in observer.needs
            if with_inputs := "attention_inputs" in observer.needs:
                inputs = stack.enter_context(attention_inputs(model, geometry))
            if with_outputs:
                streams = stack.enter_context(entering_streams(model, geometry))
                weights = output_weights(model, geometry)

            def observe(layer: int, reading: Reading) -> None:
                started = time.perf_counter()
                if with_outputs:
                    stream = streams[layer][-reading.query.shape[1] :]
                    reading = replace(reading, stream=stream, output_weights=weights[layer])
                if with_inputs:
                    reading = replace(reading, inputs=inputs.pop(layer)[-reading.query.shape[1] :])
                observer.watch(geometry.full_layers.index(layer), reading)
                self._watch_s += time.perf_counter() - started

            start = self.length - min(observer.num_queries, self.context_ids.numel())
            self.cache.set_watch(Watch(self.prefix_ids.numel(), start, observe, last, with_outputs or with_inputs))
            stack.callback(self.cache.set_watch, None)
            yield

    @torch.inference_mode()
    def score(
        self,
        scorer_name: str = "reconstruction",
        chunk_len: int = CHUNK_LEN,
        *,
        faithful: bool = False,
        local: bool = False,
        profile: Profile | None = None,
        queries: ReplayedQueries | None = None,
        progress: Progress = silent,
    ) -> Tensor:
        """Scores [Lf, Hkv, S] float32 of the context's pairs, higher = keep.

        scorer_name: may have options, as `window:window_size=64`.  local: a replayed chunk sees prefix and chunk alone,
        so that the cost is linear in the length of the context.  profile: of the model, where the scorer needs it.
        queries: filled meanwhile, where the scorer has the context replayed.
        A scorer that needs queries of the context and was not named to `prefill` has the text read again for it, over
        the stored keys: a forward pass up to the last full-attention layer, exact with sliding windows too, that stores
        nothing. So one prefill serves any number of methods, and queries are never kept.
        """
        watched, self._watched = self._watched, None
        if watched is not None and watched[0] == scorer_name:
            scorer = watched[1]
        else:
            scorer = self.make_scorer(scorer_name)
            self._watched = watched
            if profile is not None:
                scorer.learn(profile)
            if scorer.needs & WHILE_READING:
                self.read_again(scorer, progress=progress)
        observer = scorer if queries is None else Together([scorer, queries])
        self._replay_and_read(observer, chunk_len, faithful, local, progress)
        return scorer.scores()

    @torch.inference_mode()
    def profile(
        self, profiler: type[Profiler], chunk_len: int = CHUNK_LEN, *, local: bool = False, progress: Progress = silent
    ) -> Profile:
        """What a profiler learns of the model from this text. Raises ModelError for a model that it can't watch."""
        observer = profiler(self._shape)
        if observer.needs & WHILE_READING:
            self.read_again(observer, progress=progress)
        self._replay_and_read(observer, chunk_len, False, local, progress)
        return observer.profile()

    def _replay_and_read(
        self, observer: Observer, chunk_len: int, faithful: bool, local: bool, progress: Progress
    ) -> None:
        if "replay_queries" in observer.needs:
            self.replay(observer, chunk_len, merge_short=not faithful, local=local, progress=progress)
        if "keys" in observer.needs:
            for index, layer in enumerate(self.engine.geometry.full_layers):
                keys, values = self.cache.layers[layer].read(slice(self.prefix_ids.numel(), self.length))
                observer.read(index, keys[0], values[0])

    @torch.inference_mode()
    def read_again(self, observer: Observer, block_len: int = PREFILL_BLOCK, *, progress: Progress = silent) -> None:
        """Read prefix and context once more while `observer` watches; the cache stays as it is."""
        with self.cache.read_again(), self._watching(observer, last=self.engine.geometry.full_layers[-1]):
            self._read(0, block_len, "score", progress)

    @torch.inference_mode()
    def replay(
        self,
        observer: Observer,
        chunk_len: int = CHUNK_LEN,
        *,
        merge_short: bool = True,
        local: bool = False,
        progress: Progress = silent,
    ) -> None:
        """Let the model repeat the context chunk by chunk while `observer` watches."""
        model, geometry, prefix_len = self.engine.model, self.engine.geometry, self.prefix_ids.numel()
        full_layers, total = geometry.full_layers, self.context_ids.numel()
        progress("score", 0, total)
        with ExitStack() as stack:
            norms: dict[int, Tensor] = {}
            weights: dict[int, Tensor] = {}
            if "hidden_states" in observer.needs:
                norms, weights = stack.enter_context(input_norms(model, geometry)), output_weights(model, geometry)

            def observe(layer: int, seen: Observation) -> None:
                index = full_layers.index(layer)
                extra = replace(seen, input_norms=norms.get(layer), output_weights=weights.get(layer))
                observer.observe(index, extra)
                done = (seen.chunk.stop - seen.chunk.start) * (index + 1) // len(full_layers)
                progress("score", seen.chunk.start + done, total)

            for chunk, ids in self._replays(chunk_slices(total, chunk_len, merge_short=merge_short)):
                start, end = prefix_len + chunk.start, prefix_len + chunk.stop
                replay(model, ids, self.cache, Replay(prefix_len, start, end, observe, full_layers[-1], local))

    def _replays(self, chunks: list[slice]) -> Iterator[tuple[slice, Tensor]]:
        """Each chunk with the ids that repeat it: prompt, bridge, end of turn, the chunk itself."""
        for chunk in chunks:
            prompt = self.engine.prompts.before(self.context_ids, chunk.start)
            yield chunk, torch.cat([prompt, self.context_ids[chunk]])

    def amounts(self, transforms: Sequence[BaseTransform] = ()) -> Amounts:
        """What budgets are taken of, where the pairs that stay are stored by these transforms."""
        layers = self.engine.geometry.layers
        itemsize = self.engine.model.dtype.itemsize
        full = [layers[i] for i in self.engine.geometry.full_layers]
        windows = [layer for layer in layers if layer.window is not None]
        prefix = sum(layer.num_kv_heads for layer in full) * self.prefix_ids.numel()
        head_dim = full[0].head_dim
        plain, bias = 2.0 * head_dim * itemsize, sum(t.bias_nbytes for t in transforms)
        pair_nbytes = bias + min([plain, *(t.pair_nbytes(head_dim, itemsize) for t in transforms)])
        prefix_nbytes = bias + min([plain, *(t.prefix_pair_nbytes(head_dim, itemsize) for t in transforms)])
        heads = sum(layer.num_kv_heads for layer in full) * sum(t.head_nbytes(head_dim) for t in transforms)
        sliding = sum(
            2 * layer.num_kv_heads * layer.head_dim * min(self.length, (layer.window or 1) - 1) for layer in windows
        )
        offsets = sum(4 * (layer.num_kv_heads + 1) for layer in [*full, *windows])
        num_pairs = sum(layer.num_kv_heads for layer in full) * self.context_ids.numel()
        fixed = math.ceil(prefix * prefix_nbytes) + heads + sliding * itemsize + offsets
        return Amounts(num_pairs, fixed, pair_nbytes, self.engine.geometry.kv_nbytes(self.length, torch.float16))

    @torch.inference_mode()
    def evict(
        self,
        keep_mask: Tensor,
        *,
        scores: Tensor | None = None,
        queries: ReplayedQueries | None = None,
        transforms: Sequence[BaseTransform] = (),
        fetch: BaseFetch | None = None,
        release: bool = False,
    ) -> tuple[RaggedLayer, ...]:
        """The kept pairs of every layer, keys shifted so that a question starts at position 0; of a shared layer, the
        very object of its source.

        keep_mask: [Lf, Hkv, S] bool over the context; the prefix always stays.  transforms, then fetch: applied to each
        full-attention layer as soon as it is packed.  scores: [Lf, Hkv, S], and queries: shown to the transforms.
        release: give each layer's full cache back as soon as it is packed; this object is of no use afterwards.
        """
        index_of = {layer: index for index, layer in enumerate(self.engine.geometry.full_layers)}
        shared, packed = self.engine.geometry.shared, dict[int, RaggedLayer]()
        for index, dense in self.cache.stored.items():
            mask = self._with_prefix(keep_mask[index_of[index]]) if index in index_of else None
            layer = self._evict_layer(index, mask)
            if mask is not None:
                evicted = self._evicted(index, mask, index_of[index], scores, queries)
                for number, transform in enumerate(transforms, start=1):
                    layer = transform.apply(layer, replace(evicted, later=transforms[number:]))
                layer = layer if fetch is None else fetch.apply(layer, index)
            packed[index] = layer
            if release:
                dense.release()
        return tuple(packed[shared.get(index, index)] for index in range(len(self.cache.layers)))

    @torch.inference_mode()
    def reselect(
        self, selection: Selection, queries: ReplayedQueries | None, transforms: Sequence[BaseTransform]
    ) -> Selection:
        """What transforms choose instead: other pairs, as many in each layer. Arguments as of `evict`."""
        masks, prefix_len = [], self.prefix_ids.numel()
        for number, layer in enumerate(self.engine.geometry.full_layers):
            evicted = self._evicted(layer, self._with_prefix(selection.mask[number]), number, None, queries)
            for transform in transforms:
                evicted = replace(evicted, keep_mask=transform.choose(evicted))
            masks.append(evicted.keep_mask[:, prefix_len:].to(selection.mask.device))
        return replace(selection, mask=torch.stack(masks))

    def _with_prefix(self, keep_mask: Tensor) -> Tensor:
        """A keep mask [Hkv, S] of the context as one of prefix and context [Hkv, P + S], on the model's device."""
        mask = torch.nn.functional.pad(keep_mask, (self.prefix_ids.numel(), 0), value=True)
        return mask.to(self.engine.model.device)

    def _evicted(
        self, index: int, mask: Tensor, number: int, scores: Tensor | None, queries: ReplayedQueries | None
    ) -> Evicted:
        """What transforms are shown of the full-attention layer `index`, the one of that number among these."""
        dense, prefix_len = self.cache.stored[index], self.prefix_ids.numel()
        if scores is not None:
            scores = torch.nn.functional.pad(scores[number], (prefix_len, 0), value=torch.inf)[mask.to(scores.device)]
        own, inv_freq = None if queries is None else queries.of(number), self._inv_freq(index)
        return Evicted(dense.keys[0], dense.values[0], mask, prefix_len, scores, own, inv_freq)

    def _inv_freq(self, index: int) -> Tensor | None:
        """Of a layer's rotation, on the model's device."""
        inv_freq = self.engine.geometry.layers[index].inv_freq
        return None if inv_freq is None else inv_freq.to(self.engine.model.device)

    def _evict_layer(self, index: int, mask: Tensor | None) -> RaggedLayer:
        dense = self.cache.stored[index]
        keys, values = dense.keys[0], dense.values[0]
        if mask is None:
            mask = torch.ones(keys.shape[:2], dtype=torch.bool, device=keys.device)
        return RaggedLayer(
            keys=shift_keys(pack(keys, mask), self._inv_freq(index), -self.length),
            values=pack(values, mask),
            cu_seqlens=cu_seqlens_of(mask),
            window=self.engine.geometry.layers[index].window,
        )


def pack_context(
    full: FullContext,
    selection: Selection,
    info: ContextInfo,
    *,
    queries: ReplayedQueries | None = None,
    transforms: Sequence[BaseTransform] = (),
    fetch: BaseFetch | None = None,
    release: bool,
) -> RaggedContext:
    """The compressed context of a selection."""
    layers = full.evict(
        selection.mask, scores=selection.scores, queries=queries, transforms=transforms, fetch=fetch, release=release
    )
    return RaggedContext(
        layers=layers,
        prefix_ids=full.prefix_ids.to(torch.int32),
        context_ids=full.context_ids.to(torch.int32),
        kept_bits=pack_bits(selection.mask.cpu()),
        ranks=selection.ranks,
        info=info,
    )
