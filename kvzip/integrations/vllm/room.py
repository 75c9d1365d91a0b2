"""How many tokens fit behind a context. Needs no vLLM."""

from __future__ import annotations

from dataclasses import dataclass

from kvzip.integrations.vllm.library import Entry, RefusedRequest


@dataclass(frozen=True)
class Room:
    """How long requests may become.

    block_size: tokens of a block, the handle's.  max_model_len: of a request as vLLM counts it, the handle included.
    max_positions: of the model, which context, question and answer share; None = no limit known.
    """

    block_size: int
    max_model_len: int
    max_positions: int | None

    def num_placeholders(self, entry: Entry) -> int:
        """Tokens that stand for a context in a prompt."""
        return self.block_size if entry.num_slots is None else entry.num_slots

    def max_new_tokens(self, entry: Entry, num_asked: int, max_tokens: int, prompt_len: int) -> int:
        """How many tokens the answer may have, where `max_tokens` were asked with a prompt of `prompt_len`.

        Who asks for as many as fit, as vLLM does by itself, gets as many as fit behind the context.
        Raises RefusedRequest where they do not fit.
        """
        room = self.max_model_len - self.num_placeholders(entry) - num_asked
        if self.max_positions is not None:
            room = min(room, self.max_positions - entry.logical_len - num_asked)
        wants_all = max_tokens >= self.max_model_len - prompt_len
        if room < 1 or (max_tokens > room and not wants_all):
            raise RefusedRequest(
                f"context {entry.logical_len} + question {num_asked} + max_tokens {max_tokens} tokens don't fit the "
                f"{self.max_positions} positions of the model or its max_model_len {self.max_model_len}: ask for at "
                f"most {max(room, 0)} tokens"
            )
        return min(room, max_tokens)
