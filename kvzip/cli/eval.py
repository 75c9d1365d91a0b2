"""`kvzip eval`: what methods and keep ratios cost in answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvzip.cli.compress import check_writable
from kvzip.cli.options import Device, DType, Quiet, complete_model, examples
from kvzip.cli.screen import Bars, out, print_facts, size

if TYPE_CHECKING:
    from kvzip.eval.run import EvalSettings
    from kvzip.eval.summary import Line
    from kvzip.llm import LLM

EPILOG = examples(
    "kvzip eval -m smollm2-135m --tasks retr-kv,niah --methods kvzip,random --keep-ratios 0.5,0.3 --limit 3",
    "kvzip eval -m qwen2.5-coder-0.5b --tasks squad --data squad.json --json squad.jsonl",
    "kvzip eval --list",
)


def eval_(
    model: Annotated[
        str | None, typer.Option("-m", "--model", metavar="MODEL", envvar="KVZIP_MODEL", autocompletion=complete_model)
    ] = None,
    tasks: Annotated[str, typer.Option(metavar="A,B", help="Names of --list.")] = "retr-kv,niah",
    methods: Annotated[str, typer.Option(metavar="A,B", help="Beside the full cache.")] = "kvzip,random,streaming-llm",
    keep_ratios: Annotated[str, typer.Option(metavar="R,R", help="Each below 1.")] = "0.5,0.3,0.1",
    context_len: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of a context, about.")] = 1000,
    limit: Annotated[int, typer.Option(metavar="N", min=1, help="Contexts a task.")] = 5,
    seed: Annotated[int, typer.Option(metavar="N", help="Of generated tasks.")] = 0,
    data: Annotated[str | None, typer.Option(metavar="FILE", help="For tasks that read a file.")] = None,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE.jsonl", help="Write rows there, or go on with a stopped run.")
    ] = None,
    report: Annotated[str | None, typer.Option(metavar="FILE.html", help="Write a page too: kvzip[plots].")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Show the tasks and exit.")] = False,
    dtype: DType = "auto", device: Device = "auto", quiet: Quiet = False,
) -> None:  # fmt: skip
    """Measure what methods and keep ratios cost in answers, against the full cache."""
    if list_:
        _print_tasks()
        return
    if model is None:
        raise typer.BadParameter("give --model MODEL (see `kvzip models`), or --list")
    ratios = tuple(_ratio(text) for text in keep_ratios.split(","))
    for file in filter(None, (json_file, report)):
        check_writable(Path(file))
    with Bars(quiet) as bars:
        from kvzip.cli.loading import load_llm, start

        start(bars)
        from kvzip.eval.run import EvalSettings

        settings = EvalSettings(_names(tasks), _names(methods), ratios, context_len, limit, seed, data)
        llm = load_llm(model, bars, dtype=dtype, device=device)
        lines = _measure(llm, settings, json_file, report, bars)
    _print_lines(lines)


def _measure(llm: LLM, settings: EvalSettings, json_file: str | None, report: str | None, bars: Bars) -> list[Line]:
    import tempfile

    from kvzip.bench.measure import provenance
    from kvzip.eval.run import evaluate, read_rows
    from kvzip.eval.summary import summarize

    with tempfile.TemporaryDirectory() as folder:
        path = Path(json_file) if json_file else Path(folder) / "rows.jsonl"
        evaluate(llm, settings, path, about=provenance(llm.model.device), progress=bars)
        header, rows = read_rows(path)
    if report is not None:
        from kvzip.eval.page import report_page

        Path(report).write_text(report_page(header, rows), encoding="utf-8")
    return summarize(rows)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _ratio(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"keep ratio {text.strip()!r} is not a number: give some as 0.5,0.3") from None


def _print_tasks() -> None:
    from kvzip.eval.tasks import TASKS, get_task

    print_facts((name, f"{get_task(name).source}; metric {get_task(name).metric}") for name in TASKS)


def _print_lines(lines: list[Line]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("task", "method", "keep", "score", "of full", "KL", "same answer", "memory", "n"):
        table.add_column(title, justify="left" if title in ("task", "method") else "right")
    for line in lines:
        table.add_row(
            line.task,
            line.method,
            f"{line.keep_ratio:.2f}",
            f"{100 * line.score:.1f} ± {100 * line.error:.1f}",
            "-" if line.relative is None else f"{100 * line.relative:.0f}%",
            f"{line.kl:.4f}",
            f"{100 * line.same:.0f}%",
            size(line.nbytes),
            f"{line.num_questions}" + (f" ({line.gaps} gaps)" if line.gaps else ""),
        )
    out().print(table)
