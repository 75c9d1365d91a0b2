"""Run tasks over methods and keep ratios; every row goes to a file as soon as it is known.

The file is JSON lines: a header; then for each sample what was asked, a row for each method and keep ratio, and a gap
with its reason where there can be no row. A run that was stopped goes on where it was when the header's hash is that of
the same settings.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvzip.compressed import CompressedContext
from kvzip.errors import InputError, KVZipError
from kvzip.eval.fidelity import answered, reconstruction
from kvzip.eval.questions import Asked, ask_full
from kvzip.eval.settings import FORMAT, FULL, EvalSettings, hash_of
from kvzip.eval.tasks import get_task
from kvzip.eval.tasks.base import Sample, Task, TaskSettings, choose
from kvzip.files import write_whole
from kvzip.llm import LLM
from kvzip.options import CompressOptions
from kvzip.prefilled import Prefilled
from kvzip.progress import Progress, silent

Cell = tuple[str, float | None]  # method, keep ratio asked
Key = tuple[str, int, str, float | None]
ASKED: Cell = ("", 0.0)  # in the key of the line that holds a sample's questions
WHOLE_TASK = -1  # as the number of a sample


def evaluate(
    llm: LLM, settings: EvalSettings, path: str | Path, *, about: dict[str, Any], progress: Progress = silent
) -> None:
    """Measure what the file at `path` does not hold yet.

    about: where this runs (`kvzip.bench.measure.provenance`), kept in the header of a new file.
    Raises InputError if the file holds a run of other settings.
    """
    path, config = Path(path), settings.describe(llm)
    known = _resume(path, config)
    with path.open("a", encoding="utf-8") as file:
        if known is None:
            known = set()
            _write(file, {"kind": "header", "hash": hash_of(config), "config": config, **about})
        run = _Run(llm, settings, known, progress)
        for name in settings.tasks:
            for row in run.task_rows(get_task(name)):
                _write(file, row)


def read_rows(path: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and rows of a file; a last line that was not finished is left out. Raises InputError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.split("\n")[:-1]]
        if not lines:
            raise ValueError("it has no whole line")
        header, *rows = lines
        if header["kind"] != "header" or header["config"]["format"] != FORMAT:
            raise ValueError("no header of this format")
        for row in rows:
            _key(row)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is not a result file of `kvzip eval` ({error}): give another, or remove it"
        ) from error
    return header, rows


def _resume(path: Path, config: dict[str, Any]) -> set[Key] | None:
    """What the file holds already; None = there is no file.

    A line cut off in the middle is removed, and so are gaps: they are tried again, as their cause may be gone.
    """
    if not path.exists() or path.stat().st_size == 0:
        return None
    header, rows = read_rows(path)
    if header["hash"] != hash_of(config):
        raise InputError(f"{path} holds a run of other settings: give another file, or remove it")
    kept = [row for row in rows if row["kind"] != "gap"]
    write_whole(path, "".join(map(_line, (header, *kept))).encode())
    return {_key(row) for row in kept}


class _Run:
    """One pass over the tasks; rows in `known` are left out."""

    def __init__(self, llm: LLM, settings: EvalSettings, known: set[Key], progress: Progress) -> None:
        self.llm, self.settings, self.known, self.progress = llm, settings, known, progress
        self.done = 0
        self.total = len(settings.tasks) * settings.limit * len(settings.cells) - sum(key[2] != "" for key in known)

    def task_rows(self, task: Task) -> Iterator[dict[str, Any]]:
        settings, left = self.settings, self.settings.limit
        count = lambda text: len(self.llm.tokenize(text))  # noqa: E731
        path = settings.data.get(task.name)
        asked = TaskSettings(settings.context_len, count, settings.limit, settings.seed, path, settings.questions)
        try:
            for index, sample in enumerate(task.samples(asked)):
                yield from self._sample_rows(task, index, sample)
                left -= 1
        except KVZipError as error:
            yield _gap(task, WHOLE_TASK, (FULL, 1.0), error)
        self.total -= left * len(settings.cells)  # a task may have fewer samples than asked for

    def _sample_rows(self, task: Task, index: int, sample: Sample) -> Iterator[dict[str, Any]]:
        missing = [cell for cell in self.settings.cells if (task.name, index, *cell) not in self.known]
        if not missing:
            return
        self.progress("eval", self.done, self.total)
        try:
            prefilled = self.llm.prefill(sample.context, instruction=task.instruction)
            full = prefilled.compress(CompressOptions(keep_ratio=1.0, certify=False))
            questions = choose(sample.questions, self.settings.max_questions or len(sample.questions))
            asked = ask_full(task, full, questions, self.settings.mode)
        except KVZipError as error:
            yield from (_gap(task, index, cell, error, len(sample.questions)) for cell in missing)
            self._step(len(missing))
            return
        if (task.name, index, *ASKED) not in self.known:
            yield _asked_row(task, index, sample, full, asked)
        for cell in missing:
            try:
                yield self._row(task, index, self._compressed(prefilled, full, cell), asked, cell)
            except KVZipError as error:
                yield _gap(task, index, cell, error, len(asked))
            self._step(1)

    def _step(self, rows: int) -> None:
        self.done += rows
        self.progress("eval", self.done, self.total)

    def _compressed(self, prefilled: Prefilled, full: CompressedContext, cell: Cell) -> CompressedContext:
        method, keep_ratio = cell
        if method == FULL:
            return full
        return prefilled.compress(CompressOptions(keep_ratio=keep_ratio, method=method, certify=False))

    def _row(
        self, task: Task, index: int, context: CompressedContext, asked: list[Asked], cell: Cell
    ) -> dict[str, Any]:
        started, data = time.perf_counter(), context.data
        answers = _answers(task, context, asked)
        return {
            "kind": "row",
            "task": task.name,
            "sample": index,
            "method": cell[0],
            "keep_ratio_asked": cell[1],
            "keep_ratio": data.info.keep_ratio,
            "context_len": data.context_len,
            "kv_nbytes": data.kv_nbytes,
            "resident_kv_nbytes": data.resident_kv_nbytes if data.is_fetched else None,
            "full_kv_nbytes": data.info.full_kv_nbytes,
            "answers": answers,
            "kept_share": [[round(x, 4) for x in layer] for layer in data.keep_mask.float().mean(-1).tolist()],
            "reconstruction": reconstruction(context) if self.settings.reconstruction else None,
            "prefill_s": data.info.prefill_s,
            "score_s": data.info.score_s,
            "ask_s": time.perf_counter() - started,
        }


def _answers(task: Task, context: CompressedContext, asked: list[Asked]) -> list[dict[str, Any]]:
    """What a context answers, and how near that is to the full cache."""
    answers = []
    for one in asked:
        found, ids = answered(context, one.reference, one.max_new_tokens)
        text = context.llm.generator.text(ids)
        answers.append({"answer": text, "score": task.score(text, one.question), **asdict(found)})
    return answers


def _asked_row(task: Task, index: int, sample: Sample, full: CompressedContext, asked: list[Asked]) -> dict[str, Any]:
    """What a sample asks, written once before its rows."""
    return {
        "kind": "asked",
        "task": task.name,
        "sample": index,
        "context_len": full.data.context_len,
        "about": sample.about,
        "questions": [
            {"text": a.question.text, "gold": task.gold_answer(a.question), "part": a.question.part} for a in asked
        ],
    }


def _gap(task: Task, index: int, cell: Cell, error: KVZipError, num_questions: int = 0) -> dict[str, Any]:
    """What could not be measured, and why.  num_questions: that are left without an answer."""
    return {
        "kind": "gap",
        "task": task.name,
        "sample": index,
        "method": cell[0],
        "keep_ratio_asked": cell[1],
        "num_questions": num_questions,
        "reason": str(error),
    }


def _key(row: dict[str, Any]) -> Key:
    if row["kind"] == "asked":
        return row["task"], row["sample"], *ASKED
    return row["task"], row["sample"], row["method"], row["keep_ratio_asked"]


def _write(file: Any, row: dict[str, Any]) -> None:
    file.write(_line(row))
    file.flush()


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
