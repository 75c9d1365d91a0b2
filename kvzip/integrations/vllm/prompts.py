"""What stands behind the handle of a context: the question of a request, in ids."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from kvzip.hf.prompts import Prompts
from kvzip.integrations.vllm.library import RefusedRequest
from kvzip.store.refusal import short

MODES = {  # what the prompt of a request is, as it says in kv_transfer_params
    "chat": "a conversation in the model's chat template, without a system message",
    "question": "one question; the words of the template around it are added",
    "raw": "the very tokens that follow the context",
}
EMPTY = "the question is empty: ask something"


class Questions:
    """Turns rendered prompts into what follows a context, by the chat template of the model."""

    def __init__(self, prompts: Prompts) -> None:
        self.prompts = prompts

    @cached_property
    def opening(self) -> list[int]:
        """How the chat template opens a conversation without a system prompt."""
        return self.prompts.prefix_ids()

    @cached_property
    def lead(self) -> list[int]:
        """What stands between a context and the first question."""
        return self.prompts.template_ids(self.prompts.template.question.rstrip(" "))

    @property
    def placeholder(self) -> int:
        """A token for the places of a handle; it is never computed."""
        end = self.prompts.tokenizer.eos_token_id
        return next(iter(self.opening), end if isinstance(end, int) else 0)

    def checked_mode(self, mode: object) -> str:
        """One of `MODES`. Raises RefusedRequest."""
        if not isinstance(mode, str) or mode not in MODES:
            raise RefusedRequest(f"'as' is {short(str(mode))}, allowed: {', '.join(MODES)}")
        return mode

    def behind_context(self, prompt: Sequence[int], mode: object) -> list[int]:
        """What stands behind a context for a prompt [T] and a mode of `MODES`. Raises RefusedRequest."""
        mode = self.checked_mode(mode)
        if mode == "raw":
            return list(prompt)
        if mode == "question":
            return self.prompts.question_ids(self.prompts.tokenizer.decode(list(prompt), skip_special_tokens=True))
        size = len(self.opening)
        if not self.prompts.tokenizer.chat_template or list(prompt[:size]) != self.opening:
            raise RefusedRequest(
                "the prompt does not open as the model's chat template does before a user's words: leave out the "
                "system message (the context has its own) and leading line breaks, or send a completion with "
                "'as': 'question'"
            )
        return [*self.lead, *prompt[size:]]
