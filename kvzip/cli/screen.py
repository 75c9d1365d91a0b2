"""What the user sees: the two consoles, JSON, numbers, and progress bars."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kvzip.cli.border import is_debugging

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.progress import Progress, Task, TaskID
    from rich.text import Text

TITLES = {
    "prefill": "Reading",
    "score": "Scoring",
    "certify": "Certifying",
    "distill": "Distilling",
    "eval": "Evaluating",
    "asking the hub": "Asking the hub",
    "downloading": "Downloading",
    "unpacking": "Unpacking",
    "hashing": "Hashing",
    "converting": "Converting",
    "waiting for another process": "Waiting for another process",
}
UNITS = {
    "prefill": "tokens",
    "score": "tokens",
    "certify": "tokens",
    "distill": "tokens",
    "eval": "rows",
    "converting": "tensors",
}  # bytes elsewhere
MIN_RATE_S = 0.2  # seconds before a rate means something


def out() -> Console:
    """The console of the results: standard output."""
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)


def print_json(value: Any) -> None:
    """One JSON value on standard output, and nothing else."""
    print(json.dumps(value))


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Names and values below one another."""
    from rich.text import Text

    rows = list(facts)
    width = max(len(name) for name, _ in rows) + 2
    for name, value in rows:
        out().print(Text(name.ljust(width), "dim") + Text(value), soft_wrap=True)


def size(nbytes: float) -> str:
    """Bytes in the largest binary unit that gives at least 1: "5.2 MiB"."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} GiB"


def seconds(value: float) -> str:
    """Seconds with the digits that matter: "85 ms", "1.24 s", "12.3 s"."""
    if value < 0.9995:
        return f"{1000 * value:.0f} ms"
    return f"{value:.2f} s" if value < 9.995 else f"{value:.1f} s"


def note(text: str) -> None:
    """A remark on stderr, dim."""
    from rich.console import Console

    Console(stderr=True, highlight=False, markup=False).print(text, style="dim", soft_wrap=True)


def plural(count: int, noun: str) -> str:
    """ "1 token", "1,024 tokens"."""
    return f"{count:,} {noun}" + "s" * (count != 1)


def wants_notes(quiet: bool) -> bool:
    """Whether progress and notes belong on stderr: a person watches, and did not ask for silence."""
    return not quiet and sys.stderr.isatty()


class Bars:
    """Progress on stderr while a block runs; nothing at all if `quiet`, or if stderr is not a terminal.

    Call it as a `kvzip.progress.Progress`. All of it vanishes at the end.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._live: Live | None = None
        self._tasks: dict[str, TaskID] = {}
        self._lock = threading.Lock()
        if wants_notes(quiet):
            from rich.console import Console, Group
            from rich.live import Live

            console = Console(stderr=True, highlight=False)
            self._phases, self._steps = _phases(console), _steps(console)
            self._live = Live(
                Group(self._phases, self._steps), console=console, transient=True, refresh_per_second=8,
                redirect_stdout=False, redirect_stderr=not is_debugging(),
            )  # fmt: skip

    def __enter__(self) -> Bars:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, phase: str, done: float, total: float | None) -> None:
        if self._live is None:
            return
        with self._lock:  # downloads report from a thread of their own
            if phase not in self._tasks:
                title, unit = TITLES.get(phase, phase), UNITS.get(phase, "bytes")
                self._tasks[phase] = self._phases.add_task(title, total=total, unit=unit, rate="")
            task = self._phases.tasks[self._phases.task_ids.index(self._tasks[phase])]
            elapsed_s = task.elapsed or 0.0
            now = left(done, total, elapsed_s) if phase == "eval" else rate(done, elapsed_s, task.fields["unit"])
            self._phases.update(task.id, completed=done, total=total, rate=now)

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """A line with a clock while the block runs."""
        task = None if self._live is None else self._steps.add_task(title, total=None)
        try:
            yield
        finally:
            if task is not None:
                self._steps.remove_task(task)


def _phases(console: Console) -> Progress:
    """Lines with a bar, an amount and a rate."""
    from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.text import Text

    class Bar(BarColumn):
        def render(self, task: Task) -> Any:
            return super().render(task) if task.total else Text()  # no bar where the end is unknown

    class Amount(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(amount(task.completed, task.total, task.fields["unit"]), "dim")

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(task.fields["rate"], "dim")

    title = TextColumn("{task.description}", markup=False)
    spinner = SpinnerColumn(finished_text=" ")
    return Progress(spinner, title, Bar(20), Amount(), Rate(), TimeElapsedColumn(), console=console)


def _steps(console: Console) -> Progress:
    """Lines with a clock."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    title = TextColumn("{task.description}", markup=False)
    return Progress(SpinnerColumn(), title, TimeElapsedColumn(), console=console)


def amount(done: float, total: float | None, unit: str) -> str:
    """ "1,024/2,013 tokens", "12.0 MiB/88.6 MiB"; nothing where there is no total."""
    if not total or not unit:
        return ""
    if unit == "bytes":
        return f"{size(done)}/{size(total)}"
    return f"{done:,.0f}/{total:,.0f} {unit}"


def rate(done: float, elapsed_s: float, unit: str) -> str:
    """Amount a second since the start; nothing while there is none."""
    if not done or not unit or elapsed_s < MIN_RATE_S:
        return ""
    per_s = done / elapsed_s
    return f"{size(per_s)}/s" if unit == "bytes" else f"{per_s:,.0f} {unit}/s"


def left(done: float, total: float | None, elapsed_s: float) -> str:
    """The time that remains at the pace so far: "4 min left", "50 s left"; nothing while there is none."""
    if not done or not total or done >= total:
        return ""
    remaining = elapsed_s * (total - done) / done
    return f"{remaining / 60:.0f} min left" if remaining >= 90 else f"{remaining:.0f} s left"
