"""Run tasks over methods and keep ratios; every row goes to a file as soon as it is known.

The file is JSON lines: a header, then a row for each task, sample, method and keep ratio, and a gap with its reason
where there can be no row. A run that was stopped goes on where it was when the header's hash is that of the same
settings.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvzip.budget import check_keep_ratio
from kvzip.errors import InputError, KVZipError
from kvzip.eval.fidelity import Reference, fidelity, make_reference
from kvzip.eval.tasks import get_task
from kvzip.eval.tasks.base import Sample, Task, TaskSettings
from kvzip.llm import LLM, CompressedContext, Prefilled
from kvzip.methods import parse_method
from kvzip.options import CompressOptions
from kvzip.progress import Progress, silent

FULL = "full"  # the name of the row that everything is compared with
FORMAT = 1
Key = tuple[str, int, str, float]


@dataclass(frozen=True)
class EvalSettings:
    """What is measured.

    tasks, methods: names of the registries.  keep_ratios: each below 1; the full cache is always measured.
    context_len: tokens of a context, about.  limit: samples a task.  data: a file for tasks that read one.
    Raises UnknownNameError, BudgetError or InputError.
    """

    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    keep_ratios: tuple[float, ...]
    context_len: int
    limit: int
    seed: int = 0
    data: str | None = None

    def __post_init__(self) -> None:
        for name in self.tasks:
            get_task(name)
        for name in self.methods:
            parse_method(name)
        for keep_ratio in self.keep_ratios:
            if check_keep_ratio(keep_ratio) == 1:
                raise InputError("keep ratio 1 is the full cache, which is always measured: leave it out")
        if self.limit < 1:
            raise InputError(f"limit {self.limit} is out of range: give at least 1 sample")

    def describe(self, llm: LLM) -> dict[str, Any]:
        """All that decides the rows, as it stands in the header."""
        versions = {name: get_task(name).version for name in self.tasks}
        data = None if self.data is None else {"name": Path(self.data).name, "sha256": _sha256(self.data)}
        model = {"model": llm.name, "fingerprint": llm.fingerprint, "dtype": llm.dtype_name}
        return {"format": FORMAT, **asdict(self), "data": data, "task_versions": versions, **model}


def evaluate(
    llm: LLM, settings: EvalSettings, path: str | Path, *, about: dict[str, Any], progress: Progress = silent
) -> None:
    """Measure what the file at `path` does not hold yet.

    about: where this runs (`kvzip.bench.measure.provenance`), kept in the header of a new file.
    Raises InputError if the file holds a run of other settings.
    """
    path, config, total = Path(path), settings.describe(llm), settings.limit * len(settings.tasks)
    known = _resume(path, config)
    with path.open("a", encoding="utf-8") as file:
        if known is None:
            known = set()
            _write(file, {"kind": "header", "hash": hash_of(config), "config": config, **about})
        for number, name in enumerate(settings.tasks):
            done = lambda samples: progress("eval", number * settings.limit + samples, total)  # noqa: B023, E731
            for row in _task_rows(llm, get_task(name), settings, known, done):
                _write(file, row)


def hash_of(config: dict[str, Any]) -> str:
    """A name for settings: equal settings have equal names."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def read_rows(path: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and rows of a file; a last line that was not finished is left out. Raises InputError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.split("\n")[:-1]]
        header, *rows = lines
        if header["kind"] != "header" or header["config"]["format"] != FORMAT:
            raise ValueError("no header of this format")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is not a result file of `kvzip eval` ({error}): give another, or remove it"
        ) from error
    return header, rows


def _resume(path: Path, config: dict[str, Any]) -> set[Key] | None:
    """What the file holds already; None = there is no file. A line cut off in the middle is removed."""
    if not path.exists() or path.stat().st_size == 0:
        return None
    header, rows = read_rows(path)
    if header["hash"] != hash_of(config):
        raise InputError(f"{path} holds a run of other settings: give another file, or remove it")
    with path.open("rb+") as file:
        file.truncate(file.read().rfind(b"\n") + 1)
    return {_key(row) for row in rows}


def _task_rows(
    llm: LLM, task: Task, settings: EvalSettings, known: set[Key], done: Callable[[int], None]
) -> Iterator[dict[str, Any]]:
    count = lambda text: len(llm.tokenize(text))  # noqa: E731
    asked = TaskSettings(settings.context_len, count, settings.limit, settings.seed, settings.data)
    done(0)
    try:
        for index, sample in enumerate(task.samples(asked)):
            yield from _sample_rows(llm, task, settings, known, (index, sample))
            done(index + 1)
    except KVZipError as error:
        gap = _gap(task, -1, FULL, 1.0, error)
        if _key(gap) not in known:
            yield gap


def _sample_rows(
    llm: LLM, task: Task, settings: EvalSettings, known: set[Key], numbered: tuple[int, Sample]
) -> Iterator[dict[str, Any]]:
    index, sample = numbered
    wanted = [(FULL, 1.0), *((m, r) for m in settings.methods for r in settings.keep_ratios)]
    missing = [(m, r) for m, r in wanted if (task.name, index, m, r) not in known]
    if not missing:
        return
    try:
        prefilled = llm.prefill(sample.context, instruction=task.instruction)
        full = prefilled.compress(1.0)
        references = [make_reference(full, question.text, task.max_new_tokens) for question in sample.questions]
    except KVZipError as error:
        yield from (_gap(task, index, method, keep_ratio, error) for method, keep_ratio in missing)
        return
    for method, keep_ratio in missing:
        try:
            context = full if method == FULL else _compressed(prefilled, method, keep_ratio)
            yield _row(task, numbered, context, references, (method, keep_ratio))
        except KVZipError as error:
            yield _gap(task, index, method, keep_ratio, error)


def _compressed(prefilled: Prefilled, method: str, keep_ratio: float) -> CompressedContext:
    return prefilled.compress(CompressOptions(keep_ratio=keep_ratio, method=method))


def _row(
    task: Task,
    numbered: tuple[int, Sample],
    context: CompressedContext,
    references: list[Reference],
    asked: tuple[str, float],
) -> dict[str, Any]:
    index, sample = numbered
    started, questions = time.perf_counter(), []
    for question, reference in zip(sample.questions, references, strict=True):
        answer = context.ask(question.text, max_new_tokens=task.max_new_tokens)
        questions.append(
            {
                "question": question.text,
                "golds": list(question.golds),
                "answer": str(answer),
                "score": task.score(str(answer), question),
                **asdict(fidelity(context, reference)),
            }
        )
    data = context.data
    return {
        "kind": "row",
        "task": task.name,
        "sample": index,
        "method": asked[0],
        "keep_ratio_asked": asked[1],
        "keep_ratio": data.info.keep_ratio,
        "context_len": data.context_len,
        "kv_nbytes": data.kv_nbytes,
        "full_kv_nbytes": data.info.full_kv_nbytes,
        "about": sample.about,
        "questions": questions,
        "prefill_s": data.info.prefill_s,
        "score_s": data.info.score_s,
        "ask_s": time.perf_counter() - started,
    }


def _gap(task: Task, index: int, method: str, keep_ratio: float, error: KVZipError) -> dict[str, Any]:
    """What could not be measured, and why.  index: -1 = the whole task."""
    return {
        "kind": "gap",
        "task": task.name,
        "sample": index,
        "method": method,
        "keep_ratio_asked": keep_ratio,
        "reason": str(error),
    }


def _key(row: dict[str, Any]) -> Key:
    return row["task"], row["sample"], row["method"], row["keep_ratio_asked"]


def _write(file: Any, row: dict[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    file.flush()


def _sha256(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}): give an existing file") from error
