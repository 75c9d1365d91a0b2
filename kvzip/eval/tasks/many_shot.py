"""Learn a labelling from many examples (SCBench ICL.ManyShot, arXiv 2412.10319)."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Iterator
from itertools import cycle, islice

from kvzip.errors import InputError
from kvzip.eval.tasks.base import FittedTask, Question, Sample, TaskSettings
from kvzip.eval.tasks.words import ADJECTIVES, CATEGORIES
from kvzip.files import read_utf8

NUM_QUESTIONS = 5
MIN_ITEMS = 40
Kinds = dict[str, list[list[str]]]  # label -> things, each in all its wordings


class ManyShot(FittedTask):
    """Things with the letter of their kind, as many as fit; the letters of others are asked for.

    Which letter stands for which kind is drawn anew for each context, so that only the context can tell. Every letter
    is shown; where there are too few examples for the length, they are shown again.
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
        self.min_items = max(8, len(self.kinds))
        yield from super().samples(settings)

    def make(self, rng: random.Random, num_items: int, index: int) -> Sample:
        letters = dict(
            zip(self.kinds, rng.sample(string.ascii_uppercase[: len(self.kinds)], len(self.kinds)), strict=True)
        )
        left = {kind: rng.sample(things, len(things)) for kind, things in self.kinds.items()}
        asked = []
        for _ in range(NUM_QUESTIONS):
            kind = rng.choice([kind for kind, things in left.items() if len(things) > 1])
            asked.append((rng.choice(left[kind].pop()), kind))
        first = [(rng.choice(things.pop()), kind) for kind, things in left.items()]
        rest = [(text, kind) for kind, things in left.items() for thing in things for text in thing]
        rng.shuffle(rest)
        shown = list(islice(cycle([*first, *rest]), num_items))
        rng.shuffle(shown)
        lines = [f"Example: {text}\nLabel: ({letters[kind]})" for text, kind in shown]
        questions = (
            Question(
                f"Example: {text}\nWhat is the label of this example? Answer with the letter alone.", (letters[k],)
            )
            for text, k in asked
        )
        return Sample("\n\n".join(lines), tuple(questions))


def bundled() -> Kinds:
    """Things of six kinds, each with every adjective."""
    return {kind: [[f"{a} {word}" for a in ADJECTIVES] for word in words.split()] for kind, words in CATEGORIES.items()}


def _read(path: str) -> Kinds:
    """The things of a file, each text once, with its first label."""
    labels: dict[str, str] = {}
    count = 0
    for number, line in enumerate(read_utf8(path).split("\n"), 1):
        if line.strip():
            try:
                item = json.loads(line)
                text, label = item["text"].strip(), item["label"]
                if not text or not isinstance(label, (str, int)):
                    raise ValueError("text must not be empty, label must be a word or a whole number")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(f"{path}, line {number}: not an object with text and label ({error!r})") from error
            labels.setdefault(text, str(label))
            count += 1
    kinds: Kinds = {}
    for text, label in labels.items():
        kinds.setdefault(label, []).append([text])
    if not 2 <= len(kinds) <= 26 or len(labels) < MIN_ITEMS:
        raise InputError(
            f"{path} has {count} items with {len(kinds)} labels, {len(labels)} of them different: give at least "
            f"{MIN_ITEMS} different items with 2 to 26 labels"
        )
    return kinds
