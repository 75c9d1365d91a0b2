"""Learn a labelling from many examples (SCBench ICL.ManyShot, arXiv 2412.10319)."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Iterator, Mapping, Sequence

from kvzip.errors import InputError
from kvzip.eval import metrics
from kvzip.eval.tasks.base import GeneratedTask, Question, Sample, TaskSettings
from kvzip.eval.tasks.words import ADJECTIVES, CATEGORIES
from kvzip.files import read_utf8

NUM_QUESTIONS = 5
MIN_ITEMS = 40


class ManyShot(GeneratedTask):
    """Things with the letter of their kind, as many as fit; the letters of others are asked for.

    Which letter stands for which kind is drawn anew for each context, so that only the context can tell.
    path: JSON lines with `text` and `label`; things of six kinds where none is given.
    """

    name = "icl-many-shot"
    source = "SCBench ICL.ManyShot, arXiv 2412.10319; the label set is ours, or yours"
    licence = "that of the file; the bundled set is part of kvzip"
    metric = "choice"
    num_questions = str(NUM_QUESTIONS)
    reads = "JSON lines with text and label"
    instruction = "Below are examples with their labels. Find out what the labels mean."
    max_new_tokens = 8

    def samples(self, settings: TaskSettings) -> Iterator[Sample]:
        self.kinds = bundled() if settings.path is None else _read(settings.path)
        yield from super().samples(settings)

    def make(self, rng: random.Random, num_items: int, index: int) -> Sample:
        letters = dict(
            zip(self.kinds, rng.sample(string.ascii_uppercase[: len(self.kinds)], len(self.kinds)), strict=True)
        )
        asked = [rng.choice(list(self.kinds)) for _ in range(NUM_QUESTIONS)]
        held = [rng.choice(self.kinds[kind]) for kind in asked]
        shown = [(text, kind) for kind, texts in self.kinds.items() for text in texts if not _about(text, held)]
        rng.shuffle(shown)
        lines = [f"Example: {text}\nLabel: ({letters[kind]})" for text, kind in shown[:num_items]]
        questions = (
            Question(
                f"Example: {text}\nWhat is the label of this example? Answer with the letter alone.", (letters[k],)
            )
            for text, k in zip(held, asked, strict=True)
        )
        return Sample("\n\n".join(lines), tuple(questions))

    def score(self, prediction: str, question: Question) -> float:
        return metrics.choice(prediction, question.golds)


def bundled() -> dict[str, list[str]]:
    """Things of six kinds."""
    return {kind: [f"{a} {word}" for word in words.split() for a in ADJECTIVES] for kind, words in CATEGORIES.items()}


def _about(text: str, held: Sequence[str]) -> bool:
    """Whether the thing is one that will be asked for, with whatever adjective."""
    return any(text.split()[-1:] == other.split()[-1:] for other in held)


def _read(path: str) -> Mapping[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    for number, line in enumerate(read_utf8(path).split("\n"), 1):
        if line.strip():
            try:
                item = json.loads(line)
                text, label = item["text"].strip(), str(item["label"])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(f"{path}, line {number}: not an object with text and label ({error!r})") from error
            kinds.setdefault(label, []).append(text)
    count = sum(map(len, kinds.values()))
    if not 2 <= len(kinds) <= 26 or count < MIN_ITEMS:
        raise InputError(
            f"{path} has {count} items with {len(kinds)} labels: give at least {MIN_ITEMS} items with 2 to 26 labels"
        )
    return kinds
