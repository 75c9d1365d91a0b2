"""The command `kvzip`. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn, TextIO

EXIT_INTERRUPTED = 130
SHOW_CURSOR = "\x1b[?25h"


def main() -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    _take_any_text(sys.stdin, "surrogateescape")
    _take_any_text(sys.stdout, "replace")
    _take_any_text(sys.stderr, "replace")
    try:
        with ending_at_once():
            from kvzip.cli.app import app
        app(prog_name="kvzip")
    except KeyboardInterrupt:
        end_interrupted()
    except OSError as error:  # help that could not be written
        sys.exit(f"kvzip: error: {error}")
    except SystemExit as end:
        if end.code == EXIT_INTERRUPTED:
            end_interrupted()
        raise


@contextmanager
def ending_at_once() -> Iterator[None]:
    """While modules are imported, Ctrl-C ends the process: some of them take a KeyboardInterrupt for a missing
    dependency, and go on. Nothing that would need cleaning up may happen inside."""
    before = signal.signal(signal.SIGINT, end_interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def end_interrupted(*_: object) -> NoReturn:
    """Say so and end, without the interpreter's own farewell, which a second Ctrl-C could disturb."""
    with suppress(OSError, ValueError):
        start = f"{SHOW_CURSOR}\n" if sys.stderr.isatty() else ""  # below the ^C that the terminal shows
        print(f"{start}kvzip: interrupted", file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(EXIT_INTERRUPTED)


def _take_any_text(stream: TextIO | None, errors: str) -> None:
    """No character is an error: what stdout's encoding lacks becomes `?`, and stdin is checked where it is used."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors=errors)
