"""What a run of `kvzip eval` measures, checked before any work, and the name of it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kvzip._version import __version__
from kvzip.budget import check_keep_ratio
from kvzip.errors import InputError, UnknownNameError
from kvzip.eval.tasks import get_task
from kvzip.llm import LLM
from kvzip.methods import parse_method

FULL = "full"  # the name of the row that everything is compared with
BASELINES = ("random", "streaming-llm")  # what a method should beat; always measured
MODES = ("multi-request", "multi-turn")
FORMAT = 2


@dataclass(frozen=True)
class EvalSettings:
    """What is measured.

    tasks, methods: names of the registries; the full cache and BASELINES are always measured too.  keep_ratios: each
    0 < r <= 1; a method that decides itself how much to keep is measured once instead.  context_len: tokens of a
    context, about.  limit: samples a task.  data: files, by the task that reads them.  questions: a file of questions,
    for the task `text`.
    mode: "multi-request" (each question alone behind the context) or "multi-turn" (behind the questions before it and
    their expected answers); the context is compressed before any question is seen in both.
    max_questions: of a context, spread over all it has; None = all.  reconstruction: also measure how much of the text
    the cache can still repeat, at the cost of a replay a row.
    Raises UnknownNameError, BudgetError or InputError.
    """

    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    keep_ratios: tuple[float, ...]
    context_len: int
    limit: int
    seed: int = 0
    data: dict[str, str] = field(default_factory=dict)
    questions: str | None = None
    mode: str = MODES[0]
    max_questions: int | None = None
    reconstruction: bool = False

    def __post_init__(self) -> None:
        for name in (*self.tasks, *self.data):
            get_task(name)
        for name in self.methods:
            parse_method(name)
        for keep_ratio in self.keep_ratios:
            check_keep_ratio(keep_ratio)
        if not (self.tasks and self.keep_ratios):
            raise InputError("nothing to measure: give at least one task and one keep ratio")
        if self.limit < 1:
            raise InputError(f"limit {self.limit} is out of range: give at least 1 sample")
        if self.max_questions is not None and self.max_questions < 1:
            raise InputError(f"max_questions {self.max_questions} is out of range: give at least 1")
        if self.mode not in MODES:
            raise UnknownNameError.of("mode", self.mode, MODES)

    @property
    def cells(self) -> list[tuple[str, float | None]]:
        """(method, keep ratio asked) of every row of a sample, the full cache first; None = the method decides."""
        known = {parse_method(name).composition for name in self.methods}
        methods = [*self.methods, *(b for b in BASELINES if parse_method(b).composition not in known)]
        return [(FULL, 1.0), *((method, ratio) for method in methods for ratio in self._asked(method))]

    def _asked(self, method: str) -> tuple[float | None, ...]:
        chosen = parse_method(method)
        if chosen.decides_count or chosen.size is not None:
            return (None,)
        return self.keep_ratios if chosen.scorer else (1.0,)

    def describe(self, llm: LLM) -> dict[str, Any]:
        """All that decides the rows, as it stands in the header."""
        versions = {name: get_task(name).version for name in self.tasks}
        data = {task: _named(path) for task, path in self.data.items()}
        questions = None if self.questions is None else _named(self.questions)
        model = {"model": llm.name, "fingerprint": llm.fingerprint, "dtype": llm.dtype_name}
        own = {**asdict(self), "data": data, "questions": questions}
        return {"format": FORMAT, "kvzip": __version__, **own, "task_versions": versions, **model}


def hash_of(config: dict[str, Any]) -> str:
    """A name for settings: equal settings have equal names."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def _named(path: str) -> dict[str, str]:
    """A file by its name and content; what is no file (the name of a package) by its name."""
    try:
        content = Path(path).read_bytes() if Path(path).is_file() else b""
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}): give a file that can") from error
    return {"name": Path(path).name, "sha256": hashlib.sha256(content).hexdigest() if content else ""}
