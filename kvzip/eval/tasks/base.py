"""What a task is: contexts, each with several questions, and a metric."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

from kvzip.errors import InputError
from kvzip.eval import metrics
from kvzip.eval.code_similarity import same_function

Item = TypeVar("Item")
CountTokens = Callable[[str], int]


@dataclass(frozen=True)
class Question:
    """One question about a context.

    golds: accepted answers, or all parts of the answer, as the metric takes them; none = the full cache's own answer.
    part: the subtask of a mixed task, judged apart.  max_new_tokens: of its answer, where not that of the task.
    """

    text: str
    golds: tuple[str, ...] = ()
    part: str = ""
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class Sample:
    """One context with its questions.  about: what varies between samples, as the depth of a needle."""

    context: str
    questions: tuple[Question, ...]
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskSettings:
    """What a run asks of a task.

    context_len: tokens of a context, about.  count_tokens: how long a text is for the model at hand.  limit: samples.
    path: a file of the user, where the task reads one (or the name of a package).  questions: a second one, as `text`
    takes it.
    """

    context_len: int
    count_tokens: CountTokens
    limit: int
    seed: int = 0
    path: str | None = None
    questions: str | None = None


class Task(ABC):
    """A task of the registry.

    version: counts up when its samples, its metric or the length of its answers change.  source: where it was
    described.  instruction: stands before the context in the user's turn.  max_new_tokens: of an answer.
    num_questions: of a context, in words.
    reads: what a file of the user holds, or None where the task reads none.
    """

    name: str
    version: int = 1
    source: str
    licence: str
    metric: str
    instruction: str | None = None
    max_new_tokens: int = 32
    num_questions: str
    reads: str | None = None

    @abstractmethod
    def samples(self, settings: TaskSettings) -> Iterator[Sample]:
        """The samples, the same ones for the same settings. Raises InputError."""

    def score(self, prediction: str, question: Question) -> float:
        """The score of one answer in [0, 1]."""
        return judge(self.metric, prediction, question.golds)

    def gold_answer(self, question: Question) -> str:
        """The expected answer as a conversation would hold it."""
        return " ".join(question.golds) if self.metric == "fraction_found" else question.golds[0]


class GeneratedTask(Task):
    """A task whose contexts are made of items, as many as fit the length that was asked for."""

    licence = "generated here"
    min_items: int = 8

    def samples(self, settings: TaskSettings) -> Iterator[Sample]:
        for index in range(settings.limit):
            rng = random.Random(f"{self.name}/{self.version}/{settings.seed}/{index}")
            yield self.make(rng, self.num_items(settings), index)

    def num_items(self, settings: TaskSettings) -> int:
        """How many items make a context of about `context_len` tokens."""
        rng = random.Random(0)
        few, many = (settings.count_tokens(self.make(rng, n, 0).context) for n in (self.min_items, 4 * self.min_items))
        per_item = (many - few) / (3 * self.min_items)
        count = int(self.min_items + (settings.context_len - few) / per_item)
        if count < self.min_items:
            raise InputError(
                f"task {self.name!r} needs a context of at least {few} tokens: give --context-len {few} or more"
            )
        return count

    @abstractmethod
    def make(self, rng: random.Random, num_items: int, index: int) -> Sample:
        """A sample with that many items."""


class FittedTask(GeneratedTask):
    """A generated task whose items differ in length, so that each context is fitted by itself.

    `make` draws the same items first, however many are asked for.
    """

    def samples(self, settings: TaskSettings) -> Iterator[Sample]:
        for index in range(settings.limit):
            seed, count = f"{self.name}/{self.version}/{settings.seed}/{index}", self.min_items
            for _ in range(6):
                sample = self.make(random.Random(seed), count, index)
                length = settings.count_tokens(sample.context)
                if count == self.min_items and length > 1.1 * settings.context_len:
                    raise InputError(
                        f"task {self.name!r} needs a context of at least {length} tokens: give --context-len {length}"
                        " or more"
                    )
                if abs(length - settings.context_len) <= 0.01 * settings.context_len:
                    break
                count = max(self.min_items, round(count * settings.context_len / length))
            yield sample


def judge(metric: str, prediction: str, golds: Sequence[str]) -> float:
    """The score of an answer by a metric's name: a function of `kvzip.eval.metrics`, or `same_function`."""
    score: float = (same_function if metric == "same_function" else getattr(metrics, metric))(prediction, golds)
    return score


def choose(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` of the items, spread evenly over them."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def spread(rng: random.Random, length: int, count: int) -> list[int]:
    """`count` different indices below `length`, one from each of `count` equal parts, so that all depths are asked."""
    edges = [length * i // count for i in range(count + 1)]
    return [rng.randrange(low, max(low + 1, high)) for low, high in pairwise(edges)]
