"""The chat template of any tokenizer, split into what stands before the context and what follows a question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from kvzip.errors import ModelError

FIRST, REPLY, SECOND = "\u2039context\u203a", "\u2039reply\u203a", "\u2039question\u203a"
PLAIN_SUFFIX = "\nAnswer:"
PLAIN_QUESTION = "Question: "
QUESTION_SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Template:
    """Texts around a context and its questions.

    before: what opens the conversation, up to the context.  question: what stands between context and question.
    after: what closes the question and opens the answer.  between: what closes an answer and opens the next question.
    stop_strings: where to stop generating besides the model's end tokens (models without a chat template).
    """

    before: str
    question: str
    after: str
    between: str
    stop_strings: tuple[str, ...] = ()


def make_template(
    tokenizer: PreTrainedTokenizerBase,
    *,
    system: str | None = None,
    instruction: str | None = None,
    thinking: bool = False,
) -> Template:
    """Split the chat template of `tokenizer`; a plain format where it has none.

    system: system prompt, or None for the template's own default.  instruction: stands before the context in the user's
    turn.  thinking: let a thinking model think (templates that know `enable_thinking`).
    Raises ModelError where the template has no place for a system prompt, or rewrites the text it is given.
    """
    lead = f"{instruction}\n\n" if instruction else ""
    if not tokenizer.chat_template:
        opening = f"{system}\n\n" if system else ""
        between = QUESTION_SEPARATOR + PLAIN_QUESTION
        stops = (f"\n{PLAIN_QUESTION.strip()}",)
        return Template(_bos(tokenizer) + opening + lead, between, PLAIN_SUFFIX, between, stops)
    head = [{"role": "system", "content": system}] if system else []
    user = {"role": "user", "content": lead + FIRST}
    before, after = _split(_render(tokenizer, [*head, user], thinking), FIRST)
    turns = [*head, user, {"role": "assistant", "content": REPLY}, {"role": "user", "content": SECOND}]
    _, rest = _split(_render(tokenizer, turns, thinking), REPLY)
    between, _ = _split(rest, SECOND)
    return Template(before, QUESTION_SEPARATOR, after, between)


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], thinking: bool) -> str:
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": thinking}
    try:
        return str(tokenizer.apply_chat_template(messages, **options))
    except Exception as error:  # a template is a program of its own and may raise anything
        raise ModelError(f"the chat template of this model refuses the conversation: {error}") from error


def _split(text: str, mark: str) -> tuple[str, str]:
    if text.count(mark) != 1:
        raise ModelError(f"the chat template of this model rewrites the text it is given ({mark!r} came out changed)")
    before, _, after = text.partition(mark)
    return before, after


def _bos(tokenizer: PreTrainedTokenizerBase) -> str:
    """The beginning-of-sequence token, where the tokenizer puts one itself."""
    bos = tokenizer.bos_token
    ids = tokenizer("a").input_ids
    return str(bos) if bos is not None and ids and ids[0] == tokenizer.bos_token_id else ""
