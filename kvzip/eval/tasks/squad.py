"""Many questions about one context, from any SQuAD JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from kvzip.errors import InputError
from kvzip.eval.tasks.base import Question, Sample, Task, TaskSettings
from kvzip.eval.tasks.hub import rows
from kvzip.files import read_utf8


class Squad(Task):
    """Articles joined up to the length asked for, and the questions about all their paragraphs.

    path: the file (SQuAD v1 or v2, XQuAD); the training split of SQuAD from the hub where none is given, paragraphs in
    their order, each once (arXiv 2505.23416).  Questions without an answer are left out.
    """

    name = "squad"
    source = "SQuAD, arXiv 1606.05250; many questions a context as in arXiv 2505.23416"
    licence = "that of the file: SQuAD and XQuAD are CC BY-SA 4.0"
    metric = "included"
    num_questions = "all of the file"
    reads = "a SQuAD JSON file; SQuAD from the hub otherwise"
    max_new_tokens = 32

    def samples(self, settings: TaskSettings) -> Iterator[Sample]:
        texts: list[str] = []
        questions: list[Question] = []
        made = 0
        for paragraph in read_paragraphs(settings.path) if settings.path else _published():
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


def _questions(paragraph: dict[str, Any]) -> list[Question]:
    return [
        Question(qa["question"], tuple(dict.fromkeys(answer["text"] for answer in qa["answers"])))
        for qa in paragraph["qas"]
        if qa.get("answers")
    ]


def _published() -> Iterator[dict[str, Any]]:
    """Paragraphs of the published set, each once, with all its questions."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows("rajpurkar/squad", None, "train", None, Squad.name):
        answers = [{"text": text} for text in row["answers"]["text"]]
        found.setdefault(row["context"], []).append({"question": row["question"], "answers": answers})
    for context, questions in found.items():
        yield {"context": context, "qas": questions}


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
