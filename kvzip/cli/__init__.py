"""The command `kvzip`. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import sys
from typing import NoReturn, TextIO

EXIT_INTERRUPTED = 130


def main() -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    _take_any_text(sys.stdin, "surrogateescape")
    _take_any_text(sys.stdout, "replace")
    _take_any_text(sys.stderr, "replace")
    try:
        from kvzip.cli.app import app

        app(prog_name="kvzip")
    except KeyboardInterrupt:  # so early that typer was not there yet
        _end_interrupted()
    except SystemExit as end:
        if end.code == EXIT_INTERRUPTED:
            _end_interrupted()
        raise


def _end_interrupted() -> NoReturn:
    newline = "\n" if sys.stderr.isatty() else ""  # after the ^C that the terminal shows
    print(f"{newline}kvzip: interrupted", file=sys.stderr)
    sys.exit(EXIT_INTERRUPTED)


def _take_any_text(stream: TextIO | None, errors: str) -> None:
    """No character is an error: what stdout's encoding lacks becomes `?`, and stdin is checked where it is used."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors=errors)
