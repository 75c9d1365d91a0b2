"""The user's own text: what the cache of just this text loses."""

from __future__ import annotations

from collections.abc import Iterator

from kvzip.errors import InputError
from kvzip.eval.cloze import cloze_questions
from kvzip.eval.tasks.base import Question, Sample, Task, TaskSettings
from kvzip.files import read_utf8

NUM_CLOZE = 10


class Text(Task):
    """One text as a whole, asked the user's questions, or which name or number is missing in sentences of it.

    path: the text.  questions: a question a line, with the expected answer behind a tab where there is one; a question
    without one is scored by whether the full cache's answer stands in the answer.
    """

    name = "text"
    source = "your own file"
    licence = "that of the file"
    metric = "included"
    num_questions = f"those of --questions, or {NUM_CLOZE} made from the text"
    reads = "a text"
    max_new_tokens = 32

    def samples(self, settings: TaskSettings) -> Iterator[Sample]:
        if settings.path is None:
            raise InputError("task 'text' needs a text: give --data text=FILE")
        text = read_utf8(settings.path)
        if settings.questions is None:
            questions = cloze_questions(text, NUM_CLOZE, settings.seed)
        else:
            questions = [_question(line) for line in read_utf8(settings.questions).split("\n") if line.strip()]
        if not questions:
            raise InputError(f"{settings.questions} has no question: give one a line")
        yield Sample(text, tuple(questions))


def _question(line: str) -> Question:
    asked, _, gold = line.strip().partition("\t")
    return Question(asked.strip(), (gold.strip(),) if gold.strip() else ())
