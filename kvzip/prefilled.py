"""A text that was read, to be compressed in any number of ways."""

from __future__ import annotations

import datetime
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvzip import store
from kvzip._version import __version__
from kvzip.auto import Search
from kvzip.budget import Amounts
from kvzip.certificate import Certifier
from kvzip.chunks import CHUNK_LEN
from kvzip.compress import FullContext, pack_context
from kvzip.compressed import CompressedContext
from kvzip.context import ContextInfo
from kvzip.errors import BudgetError
from kvzip.fetch import get_fetch
from kvzip.hf.geometry import Geometry
from kvzip.memory import peak_rss_nbytes, release_freed
from kvzip.methods import Method, parse_method
from kvzip.models.cache import cache_dir
from kvzip.options import CompressOptions
from kvzip.parts import Part
from kvzip.progress import Progress, silent
from kvzip.replayed import ReplayedQueries
from kvzip.scorers import scorer_class
from kvzip.scorers.base import Shape
from kvzip.selecting import Selection, select
from kvzip.transforms import get_transform

if TYPE_CHECKING:
    from kvzip.llm import LLM

Texts = tuple[str | None, str | None, str | None]  # system prompt, instruction, name of the source


class Prefilled:
    """A text that was read: its full cache, ready to be compressed in several ways. Made by `LLM.prefill`."""

    def __init__(
        self,
        llm: LLM,
        prefix_ids: Tensor,
        context_ids: Tensor,
        texts: Texts,
        progress: Progress,
        scorer: Part | None = None,
        geometry: Geometry | None = None,
    ) -> None:
        self.llm, self.texts, self.geometry = llm, texts, geometry or llm.geometry
        self._full = FullContext(llm.engine(self.geometry), prefix_ids, context_ids)
        self._full.fit_chunk_len()  # refuse before reading
        profile = None if scorer is None else llm.profile_for(scorer_class(scorer.name).needs, self.geometry)
        self._full.prefill(progress=progress, scorer_name=None if scorer is None else str(scorer), profile=profile)
        self._scores: dict[tuple[str, int, bool, bool], tuple[Tensor, float]] = {}
        self._queries: dict[tuple[int, bool], ReplayedQueries] = {}
        self._shared: dict[tuple[tuple[int, int], ...], Prefilled] = {}
        self._certifier = None if self.geometry.shared else Certifier(self._full)  # shared layers are no full cache

    def compress(
        self,
        options: CompressOptions | float,
        *,
        progress: Progress = silent,
        release: bool = False,
        started: float | None = None,
        geometry: Geometry | None = None,
    ) -> CompressedContext:
        """A compressed context.

        options: CompressOptions, or a keep ratio.  release: give the full cache back; nothing more can be made of it.
        started: when the work began (`time.perf_counter`), for `total_s`; prefill and scoring time where not given.
        geometry: with the layers that the method shares, where it was looked up already.
        """
        if not isinstance(options, CompressOptions):
            options = CompressOptions(keep_ratio=options)
        if options.is_auto:
            return self._search(options, progress, started)
        method = parse_method(options.method)
        geometry = geometry or self.llm.geometry_of(method)
        other = self._read_as(geometry, progress)
        if other is not self:
            return other.compress(options, progress=progress, release=release, started=started, geometry=geometry)
        transforms = [get_transform(part) for part in method.transforms]
        fetch = None if method.fetch is None else get_fetch(method.fetch)
        amounts = self._full.amounts(transforms)
        num_pairs = None if method.decides_count else options.num_pairs(amounts)
        selection, score_s = self._select(options, method, num_pairs, amounts.num_pairs, progress)
        info = self._info(options, method, selection.mask, score_s)
        certifier = self._certifier if options.certify else None
        queries = None
        if method.needs_queries and not (selection.mask.all() and not any(t.stores_codes for t in transforms)):
            queries, replay_s = self._replayed(options, progress)
            info = replace(info, score_s=score_s + replay_s)
            selection = self._full.reselect(selection, queries, transforms)
        early = release and (certifier is None or certifier.let_go(progress))
        data = pack_context(
            self._full, selection, info, queries=queries, transforms=transforms, fetch=fetch, release=early
        )
        if data.is_fetched:
            data = store.mapped(data, cache_dir() / "mapped")
        loss = None if certifier is None else certifier.certify(data, progress)
        if release:
            self._full.cache.release()
            release_freed()  # without it the C library may keep what the full cache took
        spent_s = info.prefill_s + info.score_s + (loss["seconds"] if loss else 0.0)
        total_s = spent_s if started is None else time.perf_counter() - started
        info = replace(info, total_s=total_s, peak_rss_bytes=peak_rss_nbytes(), loss=loss)
        return CompressedContext(self.llm, replace(data, info=info))

    def _search(self, options: CompressOptions, progress: Progress, started: float | None) -> CompressedContext:
        """What `kvzip.auto` chooses."""
        if options.max_loss is not None and (self._certifier is None or self._certifier.probe is None):
            raise BudgetError(
                f"max_loss {options.max_loss:g} can't be held: this text of {self._full.context_ids.numel()} tokens is "
                "too short to measure a loss on; give a keep ratio, or max_bytes"
            )

        def amounts_of(method: str) -> Amounts:
            return self._full.amounts([get_transform(part) for part in parse_method(method).transforms])

        return Search(options, lambda one: self.compress(one, progress=progress, started=started), amounts_of).run()

    def scores(
        self,
        method: Method,
        chunk_len: int = CHUNK_LEN,
        *,
        faithful: bool = False,
        replay_scope: str = "auto",
        progress: Progress = silent,
    ) -> Tensor:
        """Scores [Lf, Hkv, S] float32 of the method's scorer; computed once.  Arguments: see `CompressOptions`."""
        options = CompressOptions(chunk_len=chunk_len, faithful=faithful, replay_scope=replay_scope)
        return self._read_as(self.llm.geometry_of(method), progress)._scored(method, options, progress)[0]

    def _read_as(self, geometry: Geometry, progress: Progress) -> Prefilled:
        """The same text, read with these layers shared; once for each map."""
        if geometry.shared == self.geometry.shared:
            return self
        key = tuple(sorted(geometry.shared.items()))
        if key not in self._shared:
            full = self._full
            self._shared[key] = other = Prefilled(
                self.llm, full.prefix_ids, full.context_ids, self.texts, progress, geometry=geometry
            )
            other._certifier = self._certifier
        return self._shared[key]

    def _select(
        self, options: CompressOptions, method: Method, num_pairs: int | None, total: int, progress: Progress
    ) -> tuple[Selection, float]:
        if num_pairs == total and not method.needs_scores:  # nothing to choose
            return Selection(torch.ones(self._shape, dtype=torch.bool), None), 0.0
        assert method.budget_kind is not None
        profile = self.llm.profile_for(method.budget_kind.needs, self.geometry)
        scores, score_s = self._scored(method, options, progress)
        return select(scores, method, num_pairs, profile=profile, faithful=options.faithful), score_s

    def _scored(self, method: Method, options: CompressOptions, progress: Progress) -> tuple[Tensor, float]:
        assert method.scorer is not None
        key = (str(method.scorer), options.chunk_len, options.faithful, self._is_local(options))
        if key not in self._scores:
            started, watch_s = time.perf_counter(), self._full.watched_s(str(method.scorer))
            scores = self._score(method, options, progress)
            self._scores[key] = scores, time.perf_counter() - started + watch_s
        return self._scores[key]

    def _replayed(self, options: CompressOptions, progress: Progress) -> tuple[ReplayedQueries, float]:
        """Queries of a replay, and the seconds it took, none where one was watched already."""
        key, started = (options.chunk_len, self._is_local(options)), time.perf_counter()
        if key in self._queries:
            return self._queries[key], 0.0
        found = ReplayedQueries(self._shape)
        self._full.replay(found, self._full.fit_chunk_len(options.chunk_len), local=key[1], progress=progress)
        self._queries[key] = found  # only now: a replay that was interrupted has shown a part
        return found, time.perf_counter() - started

    def _score(self, method: Method, options: CompressOptions, progress: Progress) -> Tensor:
        assert method.scorer is not None
        queries, key = None, (options.chunk_len, self._is_local(options))
        has_replay = "replay_queries" in scorer_class(method.scorer.name).needs and not options.faithful
        if method.needs_queries and has_replay and key not in self._queries:
            queries = ReplayedQueries(self._shape)
        scores = self._full.score(
            f"{method.scorer.name}-faithful" if options.faithful else str(method.scorer),
            self._full.fit_chunk_len(options.chunk_len),
            faithful=options.faithful,
            local=self._is_local(options),
            profile=self.llm.profile_for(scorer_class(method.scorer.name).needs, self.geometry),
            queries=queries,
            progress=progress,
        )
        if queries is not None:
            self._queries[key] = queries
        return scores

    @property
    def _shape(self) -> Shape:
        return *self.geometry.full_shape, self._full.context_ids.numel()

    def _is_local(self, options: CompressOptions) -> bool:
        return options.replays_locally(self._full.context_ids.numel())

    def _variant(self, options: CompressOptions, method: Method) -> str:
        """What else decided the scores, as it stands behind the name of the method."""
        local = "replay_queries" in method.needs and self._is_local(options)
        return ("+faithful" if options.faithful else "") + ("+local-replay" if local else "")

    def _info(self, options: CompressOptions, method: Method, mask: Tensor, score_s: float) -> ContextInfo:
        system, instruction, source = self.texts
        return ContextInfo(
            model=self.llm.name,
            fingerprint=self.llm.fingerprint,
            method=method.composition + self._variant(options, method),
            dtype=self.llm.dtype_name,
            keep_ratio_asked=options.ratio,
            budget_asked=options.budget_text,
            keep_ratio=mask.sum().item() / mask.numel(),
            full_kv_nbytes=self.llm.geometry.kv_nbytes(self._full.length, self.llm.model.dtype),
            prefill_s=self._full.prefill_s,
            score_s=score_s,
            system=system,
            instruction=instruction,
            source=source,
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            kvzip_version=__version__,
        )
