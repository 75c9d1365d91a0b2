"""Many questions about one context, from any SQuAD JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from kvzip.errors import InputError
from kvzip.eval import metrics
from kvzip.eval.tasks.base import Question, Sample, Task, TaskSettings
from kvzip.files import read_utf8


class Squad(Task):
    """Articles joined up to the length asked for, and the questions about all their paragraphs.

    path: the file (SQuAD v1 or v2, XQuAD); questions without an answer are left out.
    """

    name = "squad"
    source = "SQuAD, arXiv 1606.05250; many questions a context as in arXiv 2505.23416"
    licence = "that of the file: SQuAD and XQuAD are CC BY-SA 4.0"
    metric = "included"
    max_new_tokens = 32

    def samples(self, settings: TaskSettings) -> Iterator[Sample]:
        if settings.path is None:
            raise InputError("task 'squad' needs a SQuAD JSON file: give --data FILE")
        texts: list[str] = []
        questions: list[Question] = []
        made = 0
        for paragraph in read_paragraphs(settings.path):
            longer = "\n\n".join([*texts, paragraph["context"]])
            if texts and settings.count_tokens(longer) > settings.context_len:
                yield Sample("\n\n".join(texts), tuple(questions))
                made += 1
                texts, questions = [], []
                if made == settings.limit:
                    return
            texts.append(paragraph["context"])
            questions += _questions(paragraph)
        if questions and made < settings.limit:
            yield Sample("\n\n".join(texts), tuple(questions))

    def score(self, prediction: str, question: Question) -> float:
        return metrics.included(prediction, question.golds)


def _questions(paragraph: dict[str, Any]) -> list[Question]:
    return [
        Question(qa["question"], tuple(dict.fromkeys(answer["text"] for answer in qa["answers"])))
        for qa in paragraph["qas"]
        if qa.get("answers")
    ]


def read_paragraphs(path: str) -> list[dict[str, Any]]:
    """All paragraphs of a SQuAD JSON file, each with `context` and `qas`. Raises InputError."""
    try:
        articles = json.loads(read_utf8(path))["data"]
        found = [paragraph for article in articles for paragraph in article["paragraphs"]]
        for paragraph in found:
            paragraph["context"], _questions(paragraph)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not a SQuAD JSON file ({error!r})") from error
    return found
