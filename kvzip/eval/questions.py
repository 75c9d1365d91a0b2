"""The questions of a sample as a model sees them, and the full cache's answers: what all methods are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvzip.compressed import CompressedContext
from kvzip.eval.fidelity import Reference, make_reference
from kvzip.eval.tasks.base import Question, Task


@dataclass(frozen=True)
class Asked:
    """A question with its reference.

    prompt_ids: what stands behind the context when it is asked; in a conversation, all turns before it too.
    """

    question: Question
    prompt_ids: list[int]
    max_new_tokens: int
    reference: Reference


def ask_full(task: Task, full: CompressedContext, questions: Sequence[Question], mode: str) -> list[Asked]:
    """Every question with the full cache's answer.  full: a context at keep ratio 1.

    mode: "multi-turn" puts the earlier questions of the sample and their expected answers before each (SCBench, arXiv
    2412.10319: not the model's own answers, so that one error does not make the next).  Raises ContextLengthError.
    """
    llm, history, asked = full.llm, list[int](), []
    for question in questions:
        prompt_ids = [*history, *llm.question_ids(question.text, first=not history)]
        max_new_tokens = question.max_new_tokens or task.max_new_tokens
        reference = make_reference(full, prompt_ids, max_new_tokens)
        if not question.golds:
            question = replace(question, golds=(reference.text,))
        asked.append(Asked(question, prompt_ids, max_new_tokens, reference))
        if mode == "multi-turn":
            history = [*prompt_ids, *llm.tokenize(task.gold_answer(question)).tolist()]
    return asked
