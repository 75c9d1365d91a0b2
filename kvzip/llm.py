"""The front door: a model that compresses texts and opens compressed contexts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvzip import store
from kvzip.backends import get_backend
from kvzip.chunks import Asking, RepeatPrompts
from kvzip.compress import Engine, FullContext
from kvzip.compressed import CompressedContext
from kvzip.context import RaggedContext, SavedTail
from kvzip.distill import Distillation, distill
from kvzip.errors import InputError
from kvzip.generation import Generator, check_text
from kvzip.hf.fingerprint import fingerprint
from kvzip.hf.geometry import Geometry, probe
from kvzip.hf.prompts import Prompts
from kvzip.hf.template import Template
from kvzip.memory import reset_peak_rss
from kvzip.methods import Method, parse_method
from kvzip.options import CompressOptions
from kvzip.parts import Part
from kvzip.prefilled import Prefilled, Texts
from kvzip.profilers import DISTILLED, SHARING, get_profiler
from kvzip.profiles import kind_needed, load_profile, save_profile
from kvzip.progress import Progress, silent
from kvzip.scorers.base import Profile
from kvzip.scorers.distilled import num_features
from kvzip.session import Session
from kvzip.sharing import find_shared_layers, load_shared_layers, passages, save_shared_layers
from kvzip.surrogates import load_surrogate

# The wording of the paper's repository; its table 2 shows that the wording hardly matters.
REPEAT_FIRST = "\n\nRepeat the previous context exactly."
REPEAT_LATER = "\n\nRepeat the part of the previous context exactly, starting with"
ASK_WHAT_FOLLOWS = 'What does the text say right after "', '"?'  # around words of it, to measure the loss


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
        self.prompts = Prompts(tokenizer, thinking)
        self.template: Template = self.prompts.template
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
        return torch.tensor(self.prompts.text_ids(text), dtype=torch.int64)

    def prefix_ids(self, system: str | None = None, instruction: str | None = None) -> list[int]:
        """Ids of what stands before a context."""
        return self.prompts.prefix_ids(system, instruction)

    def question_ids(self, question: str, *, first: bool = True) -> list[int]:
        """Ids of a question with the template around it.  first: right after the context, not after an answer."""
        return self.prompts.question_ids(question, first=first)

    def compress(
        self,
        text: str,
        keep_ratio: float | str | None = None,
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
        geometry = self.geometry_of(method)
        full = self._prefill(text, texts, progress, method.scorer if selects else None, geometry)
        return full.compress(chosen, progress=progress, release=True, started=started, geometry=geometry)

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
        full, local = FullContext(self.engine(), prefix_ids, ids), CompressOptions().replays_locally(len(ids))
        chunk_len = full.fit_chunk_len()
        full.prefill(progress=progress)
        profile = full.profile(profiler, chunk_len, local=local, progress=progress)
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

    def engine(self, geometry: Geometry | None = None) -> Engine:
        """What `kvzip.compress` needs of this model.  geometry: with the layers that are shared; by default, none."""
        first, later, after = (
            torch.tensor(self.prompts.template_ids(text), dtype=torch.int64)
            for text in (REPEAT_FIRST, REPEAT_LATER, self.template.after)
        )
        asking = Asking(*(torch.tensor(ids, dtype=torch.int64) for ids in self.prompts.quoting_ids(*ASK_WHAT_FOLLOWS)))
        prompts = RepeatPrompts(first, later, after)
        return Engine(self.model, geometry or self.geometry, self.backend, prompts, asking)
