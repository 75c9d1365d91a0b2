"""One conversation over one compressed context: ask, stream, rewind, save."""

from __future__ import annotations

import threading
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TextIteratorStreamer

from kvzip import store
from kvzip.context import SavedTail
from kvzip.errors import InputError
from kvzip.fetch.resident import FetchStats
from kvzip.generation import (
    DEFAULT_MAX_NEW_TOKENS,
    Answer,
    Clock,
    before_stop,
    check_options,
    check_positions,
    check_question,
)

if TYPE_CHECKING:
    from kvzip.compressed import CompressedContext


class Session:
    """A conversation that remembers its turns. Made by `CompressedContext.session()` or `llm.open_session(path)`.

    turns: (question, answer) pairs so far.  cache: the transformers Cache behind it.
    One session serves one thread at a time; any number of sessions share a context.
    """

    def __init__(self, context: CompressedContext, saved: SavedTail | None = None) -> None:
        self.context = context
        self.cache = context.cache()
        self.turns: list[tuple[str, str]] = []
        self._ids: list[int] = []  # the conversation after the context
        self._starts: list[int] = []  # how many ids came before each turn
        if saved is not None:
            self._restore(saved)

    def ask(self, question: str, *, max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS, **options: Any) -> Answer:
        """Answer `question` and remember both.

        max_new_tokens: at least 1.  options: passed on to transformers' `generate` (do_sample, temperature, top_p,
        stop_strings, logits_processor, num_beams, streamer, ...); greedy by default.
        Raises InputError for an empty question or an option that kvzip sets itself, ContextLengthError where the
        model's positions do not suffice. A turn that fails or is interrupted leaves no trace.
        """
        check_question(question)
        check_options(max_new_tokens, options)
        return self._run(question, max_new_tokens, Clock(), options)

    def stream(
        self, question: str, *, max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS, **options: Any
    ) -> Generator[str, None, Answer]:
        """Like `ask`, piece by piece as the text comes.

        Closing the iterator early stops the generation; what came so far is remembered as the answer. The finished
        `Answer` is the generator's return value.
        """
        check_question(question)
        check_options(max_new_tokens, options)
        return self._pieces(question, max_new_tokens, options)

    def _pieces(self, question: str, max_new_tokens: int, options: dict[str, Any]) -> Generator[str, None, Answer]:
        streamer = TextIteratorStreamer(self.context.llm.tokenizer, skip_prompt=True, skip_special_tokens=True)
        clock = Clock()
        outcome: list[Answer | BaseException] = []

        def work() -> None:
            try:
                outcome.append(self._run(question, max_new_tokens, clock, {**options, "streamer": streamer}))
            except BaseException as error:  # raised again in the thread that reads
                outcome.append(error)
                streamer.end()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield from before_stop((piece for piece in streamer if piece), self.context.llm.generator.stop_strings)
        finally:
            clock.stopped.set()
            thread.join()
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]

    @property
    def fetch_stats(self) -> FetchStats | None:
        """What was fetched so far, over all turns and layers; None where the context is in memory."""
        return self.cache.fetch_stats

    def rewind(self, num_turns: int = 1) -> None:
        """Forget the last `num_turns` turns; costs nothing. Raises InputError if there are fewer."""
        if not 0 <= num_turns <= len(self.turns):
            raise InputError(f"can't rewind {num_turns} turns: this session has {len(self.turns)}")
        if num_turns:
            start = self._starts[-num_turns]
            del self._starts[-num_turns:], self.turns[-num_turns:], self._ids[start:]
            self.cache.rewind(min(start, self.cache.tail_len))

    def save(self, path: str | Path) -> int:
        """Write context and conversation to one .kvz file and return its bytes; `llm.open_session` reopens it."""
        return store.write(path, self.context.data, self._saved())

    def _saved(self) -> SavedTail:
        tails = [(layer.keys, layer.values) for layer in self.cache.layers]
        if not self.cache.tail_len:
            tails = [(t, t) for t in (_empty_tail(layer) for layer in self.cache.layers)]
        return SavedTail(
            keys=tuple(k.contiguous() for k, _ in tails),
            values=tuple(v.contiguous() for _, v in tails),
            token_ids=torch.tensor(self._ids, dtype=torch.int32),
            turns=tuple(self.turns),
            turn_starts=tuple(self._starts),
        )

    def _restore(self, saved: SavedTail) -> None:
        model = self.context.llm.model
        for layer, keys, values in zip(self.cache.layers, saved.keys, saved.values, strict=True):
            if keys.shape[2]:
                layer.update(keys.to(model.device, model.dtype), values.to(model.device, model.dtype))
        self._ids, self._starts, self.turns = (
            saved.token_ids.tolist(),
            list(saved.turn_starts),
            list(saved.turns),
        )

    def _run(self, question: str, max_new_tokens: int, clock: Clock, options: dict[str, Any]) -> Answer:
        llm, start, tail_len = self.context.llm, len(self._ids), self.cache.tail_len
        before = self.cache.fetch_stats
        ids = [*self._ids, *llm.question_ids(question, first=not self.turns)]
        check_positions(self.context.data.logical_len, len(ids), max_new_tokens, llm.max_positions)
        try:
            new = llm.generator.run(self.cache, torch.tensor([ids]), None, max_new_tokens, clock, options)[0]
        except BaseException:
            self.cache.rewind(tail_len)
            raise
        after = self.cache.fetch_stats
        fetched = None if after is None or before is None else after - before
        answer = Answer.of(llm.generator.text(new), new, clock, fetched)
        self._ids = ids + llm.generator.without_end(new)
        self.cache.rewind(min(self.cache.tail_len, len(self._ids)))
        self._starts.append(start)
        self.turns.append((question, str(answer)))
        return answer


def _empty_tail(layer: Any) -> torch.Tensor:
    like = layer.context
    return torch.zeros(1, like.num_kv_heads, 0, like.head_dim, dtype=like.dtype, device=like.device)
