"""Answers behind a compressed context: transformers' own `generate`, with the clock running."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from kvzip.errors import ContextLengthError, InputError
from kvzip.fetch.resident import FetchStats
from kvzip.hf.cache import SessionCache

DEFAULT_MAX_NEW_TOKENS = 256
OWN_OPTIONS = {
    "input_ids", "inputs", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "use_cache",
    "cache_implementation", "max_length", "num_return_sequences", "assistant_model", "prompt_lookup_num_tokens",
    "return_dict_in_generate",
}  # fmt: skip


class Answer(str):
    """The text of an answer, with how it came about.

    num_new_tokens: tokens generated, the end token included.  token_ids: those tokens.
    ttft_s: seconds from the call to the first token.  tpot_s: mean seconds of each further token, 0.0 if there is none.
    fetched: what was read from the file, None where the context is in memory.
    In a batch times and fetches are those of the batch.
    """

    num_new_tokens: int
    token_ids: list[int]
    ttft_s: float
    tpot_s: float
    fetched: FetchStats | None

    @classmethod
    def of(cls, text: str, token_ids: list[int], clock: Clock, fetched: FetchStats | None = None) -> Answer:
        """An answer with this text, these tokens, the times of `clock` and what was fetched for it."""
        answer = cls(text)
        answer.token_ids, answer.num_new_tokens = token_ids, len(token_ids)
        answer.ttft_s, answer.tpot_s, answer.fetched = clock.ttft_s, clock.tpot_s, fetched
        return answer


class Clock(StoppingCriteria):
    """Notes when each token came, and stops the generation when `stopped` is set."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.times: list[float] = []
        self.stopped = threading.Event()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        self.times.append(time.perf_counter())
        return torch.full((input_ids.shape[0],), self.stopped.is_set(), device=input_ids.device)

    @property
    def ttft_s(self) -> float:
        return self.times[0] - self.started if self.times else 0.0

    @property
    def tpot_s(self) -> float:
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1) if len(self.times) > 1 else 0.0


class StopText(StoppingCriteria):
    """Stops a row once its new tokens spell one of `strings`.

    transformers' own criterion prepares a table over the whole vocabulary, which takes seconds with 262,000 tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str], prompt_len: int) -> None:
        self.tokenizer, self.strings, self.prompt_len = tokenizer, strings, prompt_len
        self.reach = max(len(s.encode()) for s in strings) + 1  # a token has at least one byte

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        tails = self.tokenizer.batch_decode(input_ids[:, self.prompt_len :][:, -self.reach :])
        found = [any(stop in tail for stop in self.strings) for tail in tails]
        return torch.tensor(found, device=input_ids.device)


class Generator:
    """Calls `generate` of one model with kvzip's defaults: greedy, the model's own end tokens.

    Processors that look at earlier tokens (repetition penalty, n-gram bans) see the conversation, not the context.

    stop_strings: end an answer besides the end tokens (models without a chat template).
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str] = ()
    ) -> None:
        self.model, self.tokenizer, self.stop_strings = model, tokenizer, list(stop_strings)
        own = model.generation_config.eos_token_id
        ids = own if isinstance(own, list) else [own]
        self.end_ids = sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})
        pad = tokenizer.pad_token_id
        self.pad_id = pad if pad is not None else (self.end_ids[0] if self.end_ids else 0)

    def run(
        self,
        cache: SessionCache,
        ids: Tensor,
        mask: Tensor | None,
        max_new_tokens: int,
        clock: Clock,
        options: dict[str, Any],
    ) -> list[list[int]]:
        """New token ids of each row of `ids` [B, T] (left-padded where `mask` [B, T] is 0), cut after the end token."""
        config, extra = self._config(max_new_tokens, options)
        stops = [StopText(self.tokenizer, self.stop_strings, ids.shape[1])] if self.stop_strings else []
        extra["stopping_criteria"] = [*extra.get("stopping_criteria", []), *stops, clock]
        device = self.model.device
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids.to(device),
                attention_mask=(torch.ones_like(ids) if mask is None else mask).to(device),
                past_key_values=cache,
                generation_config=config,
                **extra,
            )
        return [self._until_end(row) for row in out[:, ids.shape[1] :].tolist()]

    def run_batch(
        self,
        cache: SessionCache,
        rows: Sequence[Sequence[int]],
        max_new_tokens: int,
        clock: Clock,
        options: dict[str, Any],
    ) -> list[list[int]]:
        """`run` over rows of different lengths."""
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), self.pad_id)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, longest - len(row) :] = torch.tensor(row)
            mask[index, longest - len(row) :] = 1
        return self.run(cache, ids, mask, max_new_tokens, clock, options)

    def _config(self, max_new_tokens: int, options: dict[str, Any]) -> tuple[GenerationConfig, dict[str, Any]]:
        """A greedy config unless asked otherwise; what it leaves open comes from the model's own generation config."""
        extra = {k: v for k, v in options.items() if k in ("streamer", "logits_processor", "stopping_criteria")}
        settings = {"eos_token_id": self.end_ids or None, "pad_token_id": self.pad_id, "do_sample": False}
        settings |= {k: v for k, v in options.items() if k not in extra}
        if settings.get("stop_strings"):
            extra["tokenizer"] = self.tokenizer
        return GenerationConfig(max_new_tokens=max_new_tokens, **settings), extra

    def _until_end(self, ids: list[int]) -> list[int]:
        ends = [i for i, token in enumerate(ids) if token in self.end_ids]
        return ids[: ends[0] + 1] if ends else ids

    def text(self, ids: list[int]) -> str:
        """The text of generated tokens, stop strings and special tokens left out."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        for stop in self.stop_strings:
            text = text.split(stop)[0]
        return text.strip()

    def without_end(self, ids: list[int]) -> list[int]:
        """The tokens of an answer as they stand in a conversation: the end token, or a stop string, cut off."""
        ids = ids[:-1] if ids and ids[-1] in self.end_ids else list(ids)
        while ids and any(stop in self.tokenizer.decode(ids) for stop in self.stop_strings):
            ids.pop()
        return ids


def before_stop(pieces: Iterator[str], stops: Sequence[str]) -> Iterator[str]:
    """The text of `pieces` up to the first stop string; what may turn out to begin one is held back until it is clear.

    All pieces are read, so that whoever makes them comes to an end.
    """
    held = ""
    for piece in pieces:
        held += piece
        ends = [at for at in map(held.find, stops) if at >= 0]
        safe = min(ends) if ends else len(held) - _begun(held, stops)
        if safe:
            yield held[:safe]
        if ends:
            held = ""
            break
        held = held[safe:]
    for _ in pieces:
        pass
    if held:
        yield held


def _begun(text: str, stops: Sequence[str]) -> int:
    """How many of the last characters of `text` are the beginning of a stop string."""
    longest = max(map(len, stops), default=1) - 1
    return next((n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in stops)), 0)


def check_text(text: object) -> None:
    """Raises InputError for a context that says nothing."""
    if not isinstance(text, str) or not text.strip():
        raise InputError("the context is empty: give a text of at least one word")


def check_question(question: str) -> None:
    """Refuse an empty question. Raises InputError."""
    if not isinstance(question, str) or not question.strip():
        raise InputError(f"the question is empty ({question!r}): give at least one word")


def check_options(max_new_tokens: int, options: dict[str, Any]) -> None:
    """Refuse fewer than one new token, and options of `generate` that kvzip sets itself. Raises InputError."""
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise InputError(f"max_new_tokens {max_new_tokens!r} is out of range: give a whole number of at least 1")
    if taken := sorted(OWN_OPTIONS & options.keys()):
        raise InputError(
            f"{taken[0]} is set by kvzip itself: leave it out, or call model.generate with context.cache()"
        )


def check_positions(used: int, asked: int, max_new_tokens: int, max_positions: int | None) -> None:
    """Refuse an answer that could run past the model's positions. Raises ContextLengthError."""
    if max_positions is not None and used + asked + max_new_tokens > max_positions:
        room = max_positions - used - asked
        remedy = f"ask for at most {room} new tokens" if room > 0 else "shorten the question, or rewind the session"
        raise ContextLengthError(
            f"context {used} + question {asked} + max_new_tokens {max_new_tokens} tokens exceed the {max_positions} "
            f"positions of the model: {remedy}"
        )
