"""A compressed text: what answers questions, holds sessions and is saved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvzip import store
from kvzip.context import RaggedContext
from kvzip.export import make_portable
from kvzip.generation import DEFAULT_MAX_NEW_TOKENS, Answer, Clock, check_options, check_positions, check_question
from kvzip.hf.cache import SessionCache
from kvzip.progress import Progress, silent
from kvzip.session import Session
from kvzip.store import portable
from kvzip.store.portable import PortableInfo

if TYPE_CHECKING:
    from kvzip.llm import LLM


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

    def export(
        self, path: str | Path, keep_ratio: float | None = None, *, certify: bool = True, progress: Progress = silent
    ) -> PortableInfo:
        """Write a portable file, for engines that count one slot a token for all heads, and return what it says.

        It has the same count of pairs in every head, the best by rank, and loses more than this context; how much is
        measured and stands in its `info.loss`. Arguments and what is read again: see `kvzip.export.make_portable`.
        Raises BudgetError, InputError (nothing to choose the pairs by) or FileError.
        """
        portable.write(path, make_portable(self.llm, self.data, keep_ratio, certify=certify, progress=progress))
        return portable.read_info(path)

    @property
    def stats(self) -> dict[str, Any]:
        """What was compressed and what it took; sizes in bytes, times in seconds."""
        data = self.data
        sizes = {"context_len": data.context_len, "prefix_len": data.prefix_len, "kv_nbytes": data.kv_nbytes}
        if data.is_fetched:
            sizes["resident_kv_nbytes"] = data.resident_kv_nbytes
        return sizes | data.info.to_dict() | {"pairs_per_head": data.pairs_per_head}
