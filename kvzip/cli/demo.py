"""`kvzip demo`: the two-minute tour. One text, the same questions to its full and to its compressed cache."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvzip.cli.options import Device, DType, Model, Quiet, examples
from kvzip.cli.screen import Bars, out, seconds, size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from kvzip.compressed import CompressedContext
    from kvzip.generation import Answer
    from kvzip.llm import LLM

EPILOG = examples("kvzip demo", "kvzip demo --keep-ratio 0.15", "kvzip demo -m smollm2-135m    smaller and weaker")
TITLE = "The four lighthouses of the Eddystone"
MAX_NEW_TOKENS = 48
MARKS, ASCII_MARKS = ("✓", "✗"), ("+", "-")  # right, wrong


@dataclass(frozen=True)
class Quiz:
    """A question about the bundled text; an answer that holds one of `expect` is right."""

    question: str
    expect: tuple[str, ...]

    def is_right(self, answer: str) -> bool:
        flat = " ".join(answer.lower().split())
        return any(phrase.lower() in flat for phrase in self.expect)


@dataclass(frozen=True)
class Tour:
    """What the demo found.  reopen_s: seconds to open the saved file, model loaded."""

    full: CompressedContext
    small: CompressedContext
    full_answers: list[Answer]
    small_answers: list[Answer]
    file_nbytes: int
    reopen_s: float


def demo(
    model: Model = "qwen2.5-coder-0.5b",
    keep_ratio: Annotated[
        float, typer.Option("-r", "--keep-ratio", metavar="R", help="Share of the KV pairs to keep, 0 < R <= 1.")
    ] = 0.3,
    dtype: DType = "auto",
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Take the two-minute tour.

    A real text, a real model, and the same questions to the full and to the compressed cache. The text is a history of
    the Eddystone lighthouses that comes with kvzip. The first run fetches the model.
    """
    quizzes = load_quizzes()
    with Bars(quiet) as bars:
        from kvzip.cli.loading import load_llm, start

        start(bars)
        from kvzip.budget import check_keep_ratio

        check_keep_ratio(keep_ratio)
        llm = load_llm(model, bars, dtype=dtype, device=device)
        tour = take(llm, keep_ratio, [quiz.question for quiz in quizzes], bars)
    show(tour, quizzes, out())


BUNDLED = "the lighthouse text of kvzip"  # what `load_text` gives, in words


def load_text() -> str:
    """The bundled text."""
    return _resource("lighthouse.txt")


def load_quizzes() -> list[Quiz]:
    """The questions about it, with what a right answer holds."""
    return [Quiz(item["question"], tuple(item["expect"])) for item in json.loads(_resource("lighthouse.json"))]


def _resource(name: str) -> str:
    return files("kvzip").joinpath("data", name).read_text(encoding="utf-8")


def take(llm: LLM, keep_ratio: float, questions: Sequence[str], bars: Bars) -> Tour:
    """Read the text once, and ask both caches."""
    from kvzip.options import CompressOptions

    prefilled = llm.prefill(load_text(), source="lighthouse.txt", progress=bars)
    full = prefilled.compress(CompressOptions(keep_ratio=1.0, certify=False))
    small = prefilled.compress(keep_ratio, release=True, progress=bars)
    full_answers = ask_all(full, questions, "Asking the full cache", bars)
    small_answers = ask_all(small, questions, "Asking the compressed cache", bars)
    with bars.step("Saving and reopening"), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lighthouse.kvz"
        nbytes = small.save(path)
        started = time.perf_counter()
        llm.open(path)
        reopen_s = time.perf_counter() - started
    return Tour(full, small, full_answers, small_answers, nbytes, reopen_s)


def ask_all(context: CompressedContext, questions: Sequence[str], title: str, bars: Bars) -> list[Answer]:
    answers = []
    for index, question in enumerate(questions, start=1):
        with bars.step(f"{title}, {index} of {len(questions)}"):
            answers.append(context.ask(question, max_new_tokens=MAX_NEW_TOKENS))
    return answers


def show(tour: Tour, quizzes: Sequence[Quiz], console: Console) -> None:
    data, llm = tour.small.data, tour.small.llm
    where = f"{data.context_len:,} tokens, {llm.name} in {llm.dtype_name} on {llm.model.device}"
    console.print(f"\n{TITLE}\n", style="bold")
    console.print(f"Read once by the model ({where}), compressed without knowing the questions.", style="dim")
    console.print(_answers_table(tour, quizzes, ASCII_MARKS if console.options.ascii_only else MARKS))
    console.print(_figures_table(tour))
    console.print(_closing(tour))


def _answers_table(tour: Tour, quizzes: Sequence[Quiz], marks: tuple[str, str]) -> Table:
    from rich.table import Table
    from rich.text import Text

    from kvzip.inspect.summary import one_line

    def cell(quiz: Quiz, answer: str) -> Text:
        mark = (marks[0], "green") if quiz.is_right(answer) else (marks[1], "red")
        return Text.assemble(mark, " ", one_line(answer, 160))

    table = Table(box=_box(), pad_edge=False, header_style="bold", show_lines=True, expand=False)
    table.add_column("Question", ratio=3)
    table.add_column("Full cache", ratio=4)
    table.add_column(f"Compressed, {_percent(tour)} kept", ratio=4)
    for quiz, *answers in zip(quizzes, tour.full_answers, tour.small_answers, strict=True):
        table.add_row(Text(quiz.question, "dim"), *(cell(quiz, answer) for answer in answers))
    right = [
        sum(quiz.is_right(answer) for quiz, answer in zip(quizzes, answers, strict=True))
        for answers in (tour.full_answers, tour.small_answers)
    ]
    table.add_row("", *(Text(f"{count} of {len(quizzes)} right", "bold") for count in right))
    return table


def _figures_table(tour: Tour) -> Table:
    from rich.table import Table

    full, small = tour.full.data, tour.small.data
    table = Table(box=_box(), pad_edge=False, header_style="bold")
    table.add_column("", style="dim", no_wrap=True)
    for title in ("Full cache", "Compressed", ""):
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    table.add_row("KV pairs kept", "100 %", _percent(tour))
    less = full.kv_nbytes / small.kv_nbytes
    table.add_row("Memory", size(full.kv_nbytes), size(small.kv_nbytes), f"{less:.1f}x less")
    for name, attribute in (("First token", "ttft_s"), ("Each further token", "tpot_s")):
        before, after = (_median(answers, attribute) for answers in (tour.full_answers, tour.small_answers))
        table.add_row(name, seconds(before), seconds(after), _speed(before, after))
    info = small.info
    table.add_row("Reading the text", seconds(info.prefill_s), seconds(info.prefill_s))
    table.add_row("Compressing it, once", "-", seconds(info.score_s), f"{info.score_s / info.prefill_s:.1f}x reading")
    return table


def _speed(before: float, after: float) -> str:
    factor = before / max(after, 1e-9)
    if 0.95 < factor < 1.05:
        return "as fast"
    return f"{factor:.1f}x faster" if factor > 1 else f"{1 / max(factor, 1e-9):.1f}x slower"


def _closing(tour: Tour) -> str:
    info = tour.small.data.info
    times = info.prefill_s / max(tour.reopen_s, 1e-9)
    return (
        f"Saved as a file of {size(tour.file_nbytes)} and reopened in {seconds(tour.reopen_s)}; reading the text again "
        f"would have taken {seconds(info.prefill_s)}, {times:,.0f} times as long.\n\n"
        "Your own text:\n"
        f"  kvzip compress FILE -m {info.model} -o doc.kvz\n"
        '  kvzip ask doc.kvz "your question"\n'
    )


def _median(answers: Sequence[Answer], attribute: str) -> float:
    return statistics.median(getattr(answer, attribute) for answer in answers)


def _percent(tour: Tour) -> str:
    return f"{100 * tour.small.data.info.keep_ratio:.0f} %"


def _box() -> Any:
    from rich import box

    return box.SIMPLE_HEAD
