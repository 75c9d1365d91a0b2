"""What a task is: contexts, each with several questions, and a metric."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

from kvzip.errors import InputError

Metric = Callable[[str, Sequence[str]], float]
CountTokens = Callable[[str], int]


@dataclass(frozen=True)
class Question:
    """One question about a context.  golds: accepted answers, or all parts of the answer, as the metric takes them."""

    text: str
    golds: tuple[str, ...]


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
    path: a file of the user, where the task reads one.
    """

    context_len: int
    count_tokens: CountTokens
    limit: int
    seed: int = 0
    path: str | None = None


class Task(ABC):
    """A task of the registry.

    version: counts up when its samples or its metric change.  source: where it was described.  instruction: stands
    before the context in the user's turn.  max_new_tokens: of an answer.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    source: ClassVar[str]
    licence: ClassVar[str]
    metric: ClassVar[str]
    instruction: ClassVar[str | None] = None
    max_new_tokens: ClassVar[int] = 32

    @abstractmethod
    def samples(self, settings: TaskSettings) -> Iterator[Sample]:
        """The samples, the same ones for the same settings. Raises InputError."""

    @abstractmethod
    def score(self, prediction: str, question: Question) -> float:
        """The score of one answer in [0, 1]."""


class GeneratedTask(Task):
    """A task whose contexts are made of items, as many as fit the length that was asked for."""

    licence = "generated here"
    min_items: ClassVar[int] = 8

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


def spread(rng: random.Random, length: int, count: int) -> list[int]:
    """`count` different indices below `length`, one from each of `count` equal parts, so that all depths are asked."""
    edges = [length * i // count for i in range(count + 1)]
    return [rng.randrange(low, max(low + 1, high)) for low, high in pairwise(edges)]
