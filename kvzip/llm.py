"""The front door: a model that compresses texts and opens compressed contexts."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvzip import store
from kvzip._version import __version__
from kvzip.backends import get_backend
from kvzip.budget import resolve_pairs
from kvzip.compress import (
    CHUNK_LEN,
    Engine,
    FullContext,
    RepeatPrompts,
    Selection,
    fit_chunk_len,
    pack_context,
    select,
)
from kvzip.context import ContextInfo, RaggedContext, SavedTail
from kvzip.distill import Distillation, distill
from kvzip.errors import InputError
from kvzip.fetch import get_fetch
from kvzip.generation import (
    DEFAULT_MAX_NEW_TOKENS,
    Answer,
    Clock,
    Generator,
    check_options,
    check_positions,
    check_question,
    check_text,
)
from kvzip.hf.cache import SessionCache
from kvzip.hf.fingerprint import fingerprint
from kvzip.hf.geometry import Geometry, probe
from kvzip.hf.template import Template, make_template
from kvzip.memory import peak_rss_nbytes, release_freed, reset_peak_rss
from kvzip.methods import Method, parse_method
from kvzip.models.cache import cache_dir
from kvzip.options import CompressOptions
from kvzip.parts import Part
from kvzip.profilers import DISTILLED, SHARING, get_profiler
from kvzip.profiles import kind_needed, load_profile, save_profile
from kvzip.progress import Progress, silent
from kvzip.scorers import scorer_class
from kvzip.scorers.base import Profile
from kvzip.scorers.distilled import num_features
from kvzip.session import Session
from kvzip.sharing import find_shared_layers, load_shared_layers, passages, save_shared_layers
from kvzip.surrogates import load_surrogate
from kvzip.transforms import get_transform

# The wording of the paper's repository; its table 2 shows that the wording hardly matters.
REPEAT_FIRST = "\n\nRepeat the previous context exactly."
REPEAT_LATER = "\n\nRepeat the part of the previous context exactly, starting with"

Texts = tuple[str | None, str | None, str | None]  # system prompt, instruction, name of the source
NO_TEXTS: Texts = (None, None, None)


class LLM:
    """A language model with its tokenizer, ready to compress. Made by `kvzip.load` or `kvzip.wrap`.

    system, instruction, thinking: see `kvzip.hf.template.make_template`; they hold for contexts made from here on.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str | None = None,
        backend: str = "auto",
        thinking: bool = False,
    ) -> None:
        self.geometry = probe(model)
        self.model, self.tokenizer, self.thinking = model.eval(), tokenizer, thinking
        self.name = name or model.config.name_or_path or type(model).__name__
        self.backend = get_backend(backend, model.device)
        self.fingerprint = fingerprint(model, tokenizer)
        self.template: Template = make_template(tokenizer, thinking=thinking)
        self.generator = Generator(model, tokenizer, self.template.stop_strings)

    def __repr__(self) -> str:
        return f"LLM({self.name!r}, dtype={self.dtype_name}, device={str(self.model.device)!r})"

    @property
    def dtype_name(self) -> str:
        """The dtype of the weights, as "float32"."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def max_positions(self) -> int | None:
        """Tokens that context, question and answer may take together; None = no limit known."""
        return self.geometry.max_positions

    def tokenize(self, text: str) -> Tensor:
        """Ids [T] int64 of text that a user gave: special tokens written in it are taken as plain text."""
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
        return torch.tensor(ids, dtype=torch.int64)

    def prefix_ids(self, system: str | None = None, instruction: str | None = None) -> list[int]:
        """Ids of what stands before a context."""
        template = make_template(self.tokenizer, system=system, instruction=instruction, thinking=self.thinking)
        return self._template_ids(template.before)

    def question_ids(self, question: str, *, first: bool = True) -> list[int]:
        """Ids of a question with the template around it.  first: right after the context, not after an answer."""
        lead = self.template.question if first else self.template.between
        gap = lead[len(lead.rstrip(" ")) :]  # a space belongs to the word that follows
        asked = self.tokenize(gap + question.strip()).tolist()
        return [*self._template_ids(lead.rstrip(" ")), *asked, *self._template_ids(self.template.after)]

    def compress(
        self,
        text: str,
        keep_ratio: float | None = None,
        *,
        system: str | None = None,
        instruction: str | None = None,
        source: str | None = None,
        progress: Progress = silent,
        **options: Any,
    ) -> CompressedContext:
        """Compress `text` once, for any later question.

        keep_ratio and the further options: see `CompressOptions`.  system: system prompt (None = the template's own).
        instruction: stands before the text in the user's turn.  source: a name for the text, kept in the file.
        Raises BudgetError, ContextLengthError, UnknownNameError, InputError, or ModelError (a profile is missing: see
        `calibrate`) before any work is done.
        """
        chosen = CompressOptions(keep_ratio=keep_ratio, **options)
        started, method = time.perf_counter(), parse_method(chosen.method)
        selects, texts = chosen.keep_ratio != 1, (system, instruction, source)
        for need in method.needs if selects else ():
            self.profile_for(frozenset({need}))  # refuse before any work
        full = self._prefill(text, texts, progress, method.scorer if selects else None, self.geometry_of(method))
        return full.compress(chosen, progress=progress, release=True, started=started)

    def prefill(
        self,
        text: str,
        *,
        system: str | None = None,
        instruction: str | None = None,
        source: str | None = None,
        progress: Progress = silent,
    ) -> Prefilled:
        """Read `text` once; the result can be compressed at several keep ratios and by several methods.

        A method that scores by the queries of the text itself, or shares layers, has it read once more: `compress`
        alone need not.
        """
        return self._prefill(text, (system, instruction, source), progress)

    def _prefill(
        self,
        text: str,
        texts: Texts,
        progress: Progress,
        scorer: Part | None = None,
        geometry: Geometry | None = None,
    ) -> Prefilled:
        """scorer: may watch while the text is read.  geometry: with the layers that are shared."""
        check_text(text)
        reset_peak_rss()
        prefix_ids = torch.tensor(self.prefix_ids(*texts[:2]), dtype=torch.int64)
        return Prefilled(self, prefix_ids, self.tokenize(text), texts, progress, scorer, geometry)

    def open(self, path: str | Path) -> CompressedContext:
        """The context saved at `path`, memory-mapped.

        Raises FormatError (not a .kvz, damaged, of another version), ModelMismatchError (of another model), FileError.
        """
        return CompressedContext(self, self._read(path)[0])

    def open_session(self, path: str | Path) -> Session:
        """The session saved at `path`; a file without one gives a new session. Raises as `open`."""
        data, tail = self._read(path)
        return Session(CompressedContext(self, data), tail)

    def calibrate(
        self, kind: str, text: str, source: str = "", *, num_layers: int | None = None, progress: Progress = silent
    ) -> Path:
        """Make the profile of that kind that some methods need, once a model; returns the file written.

        kind: "head", "baklava" or "duo" (`kvzip.profilers`), or "kvsharer" (`kvzip.sharing`).  source: a name for the
        text, kept in the file.  num_layers: of kvsharer, how many layers to share at most; by default an eighth.
        Raises UnknownNameError, InputError, ContextLengthError or ModelError.
        """
        if kind == SHARING:
            texts = passages(self.tokenizer, text)
            shared = find_shared_layers(self.engine(), texts, num_layers, progress=progress)
            return save_shared_layers(self.fingerprint, shared, source)
        if num_layers is not None:
            raise InputError(f"num_layers {num_layers} is for kvsharer alone: leave it out for {kind!r}")
        profiler = get_profiler(kind)
        check_text(text)
        prefix_ids, ids = torch.tensor(self.prefix_ids(), dtype=torch.int64), profiler.passage(self.tokenize(text))
        read, local = Prefilled(self, prefix_ids, ids, NO_TEXTS, progress), CompressOptions().replays_locally(len(ids))
        profile = read._full.profile(profiler, read._chunk_len(CHUNK_LEN), local=local, progress=progress)
        return save_profile(kind, self.fingerprint, profile, source)

    def distill(
        self, texts: Sequence[str], source: str = "", *, seed: int = 0, progress: Progress = silent
    ) -> Distillation:
        """Fit what `kvzip-fast` foretells scores with, once a model, and keep it; minutes on a CPU.

        texts: joined; best 10,000 tokens or more of the kind that will be compressed.  source: a name for them, kept in
        the file.  seed: which fifth of them is held out to report agreement.  Raises InputError, ContextLengthError,
        ModelError for a model whose attention inputs can't be watched, or FileError.
        """
        for text in texts:
            check_text(text)
        prefix_ids, ids = torch.tensor(self.prefix_ids(), dtype=torch.int64), self.tokenize("\n\n".join(texts))
        return distill(self.engine(), self.fingerprint, prefix_ids, ids, source=source, seed=seed, progress=progress)

    def profile_for(self, needs: frozenset[str], geometry: Geometry | None = None) -> Profile | None:
        """The profile that a part with these needs is to be shown, or None. Raises ModelError where it is missing.

        geometry: with the layers that are shared, which are left out of it.
        """
        kind = kind_needed(needs)
        if kind is None:
            return None
        full_layers, shape = self.geometry.full_layers, self.geometry.full_shape
        if kind == DISTILLED:
            size = self.model.config.get_text_config(decoder=True).hidden_size
            profile = load_surrogate(self.fingerprint, shape, num_features(size, shape[1]))
        else:
            profile = load_profile(kind, self.fingerprint, shape)
        stored = [full_layers.index(layer) for layer in (geometry or self.geometry).full_layers]
        return {name: values[stored] for name, values in profile.items()}

    def geometry_of(self, method: Method) -> Geometry:
        """The layers as the method reads and stores them. Raises ModelError where its profile is missing."""
        if not method.shares_layers:
            return self.geometry
        return self.geometry.sharing(load_shared_layers(self.fingerprint, self.geometry))

    def _read(self, path: str | Path) -> tuple[RaggedContext, SavedTail | None]:
        data, tail = store.read(path)
        store.check_fingerprint(data.info, self.fingerprint, path)
        return data.to(self.model.device, self.model.dtype), tail

    def _template_ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids) if text else []

    def engine(self, geometry: Geometry | None = None) -> Engine:
        """What `kvzip.compress` needs of this model.  geometry: with the layers that are shared; by default, none."""
        first, later, after = (
            torch.tensor(self._template_ids(text), dtype=torch.int64)
            for text in (REPEAT_FIRST, REPEAT_LATER, self.template.after)
        )
        return Engine(self.model, geometry or self.geometry, self.backend, RepeatPrompts(first, later, after))


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
        self._chunk_len(CHUNK_LEN)  # refuse before reading
        profile = None if scorer is None else llm.profile_for(scorer_class(scorer.name).needs, self.geometry)
        self._full.prefill(progress=progress, scorer_name=None if scorer is None else str(scorer), profile=profile)
        self._scores: dict[tuple[str, int, bool, bool], tuple[Tensor, float]] = {}
        self._shared: dict[tuple[tuple[int, int], ...], Prefilled] = {}

    def compress(
        self,
        options: CompressOptions | float,
        *,
        progress: Progress = silent,
        release: bool = False,
        started: float | None = None,
    ) -> CompressedContext:
        """A compressed context.

        options: CompressOptions, or a keep ratio.  release: give the full cache back; nothing more can be made of it.
        started: when the work began (`time.perf_counter`), for `total_s`; prefill and scoring time where not given.
        """
        if not isinstance(options, CompressOptions):
            options = CompressOptions(keep_ratio=options)
        method = parse_method(options.method)
        other = self._read_as(self.llm.geometry_of(method), progress)
        if other is not self:
            return other.compress(options, progress=progress, release=release, started=started)
        transforms = [get_transform(part) for part in method.transforms]
        fetch = None if method.fetch is None else get_fetch(method.fetch)
        amounts = self._full.amounts(transforms)
        num_pairs = None if method.decides_count else resolve_pairs(options.keep_ratio, options.budget, amounts)
        selection, score_s = self._select(options, method, num_pairs, amounts.num_pairs, progress)
        info = self._info(options, method, selection.mask, score_s)
        data = pack_context(self._full, selection, info, transforms=transforms, fetch=fetch, release=release)
        if data.is_fetched:
            data = store.mapped(data, cache_dir() / "mapped")
        if release:
            release_freed()  # without it the C library may keep what the full cache took
        total_s = info.prefill_s + score_s if started is None else time.perf_counter() - started
        info = replace(info, total_s=total_s, peak_rss_bytes=peak_rss_nbytes())
        return CompressedContext(self.llm, replace(data, info=info))

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
            self._shared[key] = Prefilled(
                self.llm, full.prefix_ids, full.context_ids, self.texts, progress, geometry=geometry
            )
        return self._shared[key]

    def _select(
        self, options: CompressOptions, method: Method, num_pairs: int | None, total: int, progress: Progress
    ) -> tuple[Selection, float]:
        if num_pairs == total and not method.needs_scores:  # nothing to choose
            shape = (*self.geometry.full_shape, self._full.context_ids.numel())
            return Selection(torch.ones(total, dtype=torch.bool).reshape(shape), None), 0.0
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

    def _score(self, method: Method, options: CompressOptions, progress: Progress) -> Tensor:
        assert method.scorer is not None
        return self._full.score(
            f"{method.scorer.name}-faithful" if options.faithful else str(method.scorer),
            self._chunk_len(options.chunk_len),
            faithful=options.faithful,
            local=self._is_local(options),
            profile=self.llm.profile_for(scorer_class(method.scorer.name).needs, self.geometry),
            progress=progress,
        )

    def _is_local(self, options: CompressOptions) -> bool:
        return options.replays_locally(self._full.context_ids.numel())

    def _chunk_len(self, chunk_len: int) -> int:
        full = self._full
        lengths = full.prefix_ids.numel(), full.context_ids.numel()
        return fit_chunk_len(*lengths, full.engine.prompts, chunk_len, self.llm.max_positions)

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
            keep_ratio_asked=options.keep_ratio,
            budget_asked=None if options.budget is None else str(options.budget),
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


class CompressedContext:
    """A compressed text that answers questions. Made by `LLM.compress` or `LLM.open`; never changes.

    data: the kept pairs and what is known of them.  Threads may share it.
    """

    def __init__(self, llm: LLM, data: RaggedContext) -> None:
        self.llm, self.data = llm, data

    def __repr__(self) -> str:
        return (
            f"CompressedContext({self.data.context_len} tokens, keep_ratio={self.data.info.keep_ratio:.3f}, "
            f"kv_nbytes={self.data.kv_nbytes})"
        )

    def ask(self, question: str, *, max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS, **options: Any) -> Answer:
        """Answer one question and forget it. Arguments and errors as in `Session.ask`."""
        return self.session().ask(question, max_new_tokens=max_new_tokens, **options)

    def stream(self, question: str, *, max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS, **options: Any) -> Iterator[str]:
        """Answer one question piece by piece, and forget it. As `Session.stream`."""
        return self.session().stream(question, max_new_tokens=max_new_tokens, **options)

    def ask_many(
        self, questions: Sequence[str], *, max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS, **options: Any
    ) -> list[Answer]:
        """Answer several questions at once, as one batch over this context. Errors as in `Session.ask`."""
        for question in questions:
            check_question(question)
        check_options(max_new_tokens, options)
        if not questions:
            return []
        rows = [self.llm.question_ids(question) for question in questions]
        check_positions(self.data.logical_len, max(map(len, rows)), max_new_tokens, self.llm.max_positions)
        clock = Clock()
        cache = self.cache()
        new = self.llm.generator.run_batch(cache, rows, max_new_tokens, clock, options)
        return [Answer.of(self.llm.generator.text(row), row, clock, cache.fetch_stats) for row in new]

    def session(self) -> Session:
        """A conversation that remembers its turns."""
        return Session(self)

    def cache(self) -> SessionCache:
        """A transformers Cache over this context: `model.generate(question_ids, past_key_values=ctx.cache())`."""
        return SessionCache(self.data, self.llm.backend)

    def save(self, path: str | Path) -> int:
        """Write a .kvz file, whole or not at all, and return its bytes. Raises FileError."""
        return store.write(path, self.data)

    @property
    def stats(self) -> dict[str, Any]:
        """What was compressed and what it took; sizes in bytes, times in seconds."""
        data = self.data
        sizes = {"context_len": data.context_len, "prefix_len": data.prefix_len, "kv_nbytes": data.kv_nbytes}
        if data.is_fetched:
            sizes["resident_kv_nbytes"] = data.resident_kv_nbytes
        return sizes | data.info.to_dict() | {"pairs_per_head": data.pairs_per_head}
