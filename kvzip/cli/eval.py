"""`kvzip eval`: what methods and keep ratios cost in answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvzip.cli.compress import check_writable
from kvzip.cli.options import Device, DType, Quiet, complete_model, examples
from kvzip.cli.screen import Bars, note, out, print_facts, size

if TYPE_CHECKING:
    from kvzip.eval.settings import EvalSettings
    from kvzip.eval.summary import Line
    from kvzip.eval.tasks.base import Task
    from kvzip.llm import LLM

EPILOG = examples(
    "kvzip eval -m smollm2-135m --tasks retr-kv,niah --methods kvzip,key-norm --keep-ratios 0.5,0.3 --limit 3",
    "kvzip eval -m qwen2.5-coder-0.5b --tasks squad --data squad.json --json squad.jsonl --report squad.html",
    "kvzip eval -m qwen2.5-coder-0.5b --tasks text --data report.txt --questions questions.txt",
    "kvzip eval --compare a.jsonl b.jsonl",
    "kvzip eval --list",
)


DataFiles = Annotated[
    list[str] | None,
    typer.Option(metavar="[TASK=]FILE", help="For a task that reads a file; several times for several tasks."),
]
Questions = Annotated[
    str | None, typer.Option(metavar="FILE", help="For task text: a question a line, answer after a tab.")
]
RowsFile = Annotated[
    str | None, typer.Option("--json", metavar="FILE.jsonl", help="Write rows there, or go on with a stopped run.")
]
TwoRuns = Annotated[tuple[str, str] | None, typer.Option(metavar="A.jsonl B.jsonl", help="Compare two runs, and exit.")]


def eval_(
    model: Annotated[
        str | None, typer.Option("-m", "--model", metavar="MODEL", envvar="KVZIP_MODEL", autocompletion=complete_model)
    ] = None,
    tasks: Annotated[str, typer.Option(metavar="A,B", help="Names of --list.")] = "retr-kv,niah",
    methods: Annotated[
        str, typer.Option(metavar="A,B", help="Beside full cache, random and streaming-llm.")
    ] = "kvzip",
    keep_ratios: Annotated[str, typer.Option(metavar="R,R", help="Each 0 < R <= 1.")] = "0.5,0.3,0.1",
    context_len: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of a context, about.")] = 1000,
    limit: Annotated[int, typer.Option(metavar="N", min=1, help="Contexts a task.")] = 5,
    max_questions: Annotated[int | None, typer.Option(metavar="N", min=1, help="Of a context; default all.")] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of generated tasks.")] = 0,
    data: DataFiles = None,
    questions: Questions = None,
    multi_turn: Annotated[
        bool, typer.Option("--multi-turn", help="Ask behind the questions before and their expected answers.")
    ] = False,
    reconstruction: Annotated[
        bool, typer.Option("--reconstruction", help="Measure how much of the text is still repeated; slow.")
    ] = False,
    json_file: RowsFile = None,
    report: Annotated[str | None, typer.Option(metavar="FILE.html", help="Write a page too: kvzip[plots].")] = None,
    pictures: Annotated[str | None, typer.Option(metavar="FOLDER", help="Write PNGs too: kvzip[plots].")] = None,
    compare: TwoRuns = None,
    list_: Annotated[bool, typer.Option("--list", help="Show the tasks, and exit.")] = False,
    dtype: DType = "auto", device: Device = "auto", quiet: Quiet = False,
) -> None:  # fmt: skip
    """Measure what methods and keep ratios cost in answers, against the full cache."""
    if list_:
        _print_tasks()
        return
    if compare:
        _print_comparison(*compare)
        return
    if model is None:
        raise typer.BadParameter("give --model MODEL (see `kvzip models`), --compare or --list")
    ratios = tuple(_ratio(text) for text in keep_ratios.split(","))
    for file in filter(None, (json_file, report)):
        check_writable(Path(file))
    with Bars(quiet) as bars:
        from kvzip.cli.loading import load_llm, start

        start(bars)
        from kvzip.eval.settings import MODES, EvalSettings
        from kvzip.methods import split_methods

        names = _names(tasks)
        settings = EvalSettings(
            names, split_methods(methods), ratios, context_len, limit, seed, _files(data or [], names), questions,
            MODES[multi_turn], max_questions, reconstruction,
        )  # fmt: skip
        llm = load_llm(model, bars, dtype=dtype, device=device)
        lines, gaps = _measure(llm, settings, json_file, (report, pictures), bars)
    _print_lines(lines)
    for gap in gaps:
        note(f"not measured: {gap}")


def _measure(
    llm: LLM, settings: EvalSettings, json_file: str | None, shown: tuple[str | None, str | None], bars: Bars
) -> tuple[list[Line], list[str]]:
    """The lines of the table, and what could not be measured with its reason.  shown: page and folder of pictures."""
    import tempfile

    from kvzip.bench.measure import provenance
    from kvzip.errors import InputError
    from kvzip.eval.run import evaluate, read_rows
    from kvzip.eval.summary import summarize
    from kvzip.files import write_whole

    report, pictures = shown
    with tempfile.TemporaryDirectory() as folder:
        path = Path(json_file) if json_file else Path(folder) / "rows.jsonl"
        evaluate(llm, settings, path, about=provenance(llm.model.device), progress=bars)
        header, rows = read_rows(path)
    lines = summarize(rows)
    if report is not None:
        from kvzip.eval.page import report_page

        write_whole(report, report_page(header, rows).encode())
    if pictures is not None:
        from kvzip.eval.plots import save_pictures

        save_pictures(lines, rows, pictures)
    gaps = (f"{row['task']}, {row['method']}: {row['reason']}" for row in rows if row["kind"] == "gap")
    reasons = list(dict.fromkeys(gaps))
    if all(line.score is None for line in lines):
        raise InputError(reasons[0])
    return lines, reasons


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _ratio(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"keep ratio {text.strip()!r} is not a number: give some as 0.5,0.3") from None


def _files(given: list[str], tasks: tuple[str, ...]) -> dict[str, str]:
    """Files by task; one without a task goes to the only task that reads files."""
    from kvzip.eval.tasks import TASKS, get_task

    found = {}
    for text in given:
        task, equals, path = text.partition("=")
        if not (equals and task in TASKS):
            readers = [name for name in tasks if get_task(name).reads]
            if len(readers) != 1:
                raise typer.BadParameter(
                    f"--data {text!r}: {len(readers)} of the tasks read a file, so name the one it is for: "
                    f"{readers[0] if readers else 'squad'}={text}"
                )
            task, path = readers[0], text
        found[task] = path
    return found


def _print_tasks() -> None:
    from kvzip.eval.tasks import TASKS, get_task

    print_facts((name, _describe(get_task(name))) for name in TASKS)


def _describe(task: Task) -> str:
    facts = [
        task.source,
        f"licence: {task.licence}",
        f"metric {task.metric}",
        f"questions a context: {task.num_questions}",
        f"version {task.version}",
    ]
    return "; ".join([*facts, f"--data {task.name}=FILE: {task.reads}"] if task.reads else facts)


def _print_comparison(first: str, second: str) -> None:
    from kvzip.eval.compare import compare
    from kvzip.eval.run import read_rows
    from kvzip.eval.summary import percent, ratio_text

    (before, rows), (after, others) = read_rows(first), read_rows(second)
    found = compare(rows, others)
    table = _table("task", "method", "keep", "first", "second", "change", "n")
    for line in found:
        table.add_row(
            line.task,
            line.method,
            ratio_text(line.keep_ratio),
            f"{100 * line.first:.1f}",
            f"{100 * line.second:.1f}",
            percent(line.change, line.error, "+"),
            str(line.num_questions),
        )
    out().print(table)
    differ = [k for k in before["config"] if before["config"][k] != after["config"].get(k)]
    if differ:
        note(f"the runs differ in {', '.join(differ)}; only questions that both asked are compared")


def _print_lines(lines: list[Line]) -> None:
    from kvzip.eval.summary import kept_text, percent

    table = _table("task", "method", "keep", "score", "of full", "KL", "same answer", "memory", "n")
    for line in lines:
        table.add_row(
            line.task,
            line.method,
            kept_text(line, 2),
            percent(line.score, line.error),
            "-" if line.relative is None else f"{100 * line.relative:.0f}%",
            "-" if line.kl is None else f"{line.kl:.4f}",
            "-" if line.same is None else f"{100 * line.same:.0f}%",
            "-" if line.nbytes is None else size(line.nbytes),
            f"{line.num_questions}" + (f" of {line.num_asked}" if line.gaps else ""),
        )
    out().print(table)


def _table(*titles: str) -> Any:
    """A borderless table; the first two columns are names, the others numbers."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for number, title in enumerate(titles):
        table.add_column(title, justify="left" if number < 2 else "right")
    return table
