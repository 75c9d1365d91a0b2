"""Ids of what stands around a context: the template's own words, and what users wrote."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from kvzip.hf.template import Template, make_template


@dataclass(frozen=True)
class Prompts:
    """A tokenizer and its chat template.  thinking: as in `make_template`."""

    tokenizer: PreTrainedTokenizerBase
    thinking: bool = False

    @cached_property
    def template(self) -> Template:
        """Around a context without a system prompt."""
        return make_template(self.tokenizer, thinking=self.thinking)

    def text_ids(self, text: str) -> list[int]:
        """Ids of text that a user gave: special tokens written in it are taken as plain text."""
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids)

    def template_ids(self, text: str) -> list[int]:
        """Ids of words of the template; special tokens in it are meant."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids) if text else []

    def prefix_ids(self, system: str | None = None, instruction: str | None = None) -> list[int]:
        """Ids of what stands before a context."""
        template = make_template(self.tokenizer, system=system, instruction=instruction, thinking=self.thinking)
        return self.template_ids(template.before)

    def question_ids(self, question: str, *, first: bool = True) -> list[int]:
        """Ids of a question with the template around it.  first: right after the context, not after an answer."""
        return [*self._opening_ids(question.strip(), first), *self.template_ids(self.template.after)]

    def quoting_ids(self, before: str, after: str) -> tuple[list[int], list[int]]:
        """Ids of what stands before and behind the words that a further question quotes, with the template around."""
        behind = [*self.text_ids(after), *self.template_ids(self.template.after)]
        return self._opening_ids(before, first=False), behind

    def _opening_ids(self, question: str, first: bool) -> list[int]:
        lead = self.template.question if first else self.template.between
        gap = lead[len(lead.rstrip(" ")) :]  # a space belongs to the word that follows
        return [*self.template_ids(lead.rstrip(" ")), *self.text_ids(gap + question)]
