"""Where exceptions end: one line on stderr, and the exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand

from kvzip.cli import EXIT_INTERRUPTED
from kvzip.errors import KVZipError

EXIT_FAILED = 1
DEBUG_VARIABLE = "KVZIP_DEBUG"


class Command(TyperCommand):
    """A command whose exceptions end at the border."""

    def invoke(self, ctx: Any) -> Any:
        with border():
            return super().invoke(ctx)


@contextmanager
def border() -> Iterator[None]:
    """Turn what is raised inside into one line on stderr and an exit code. Wrong usage passes, to typer."""
    try:
        yield
        sys.stdout.flush()
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except KeyboardInterrupt as error:
        raise typer.Exit(EXIT_INTERRUPTED) from error
    except BrokenPipeError:
        _reader_is_gone()
    except KVZipError as error:
        _failed(str(error))
    except MemoryError:
        _failed("out of memory: take a shorter text, a smaller model, or a lower keep ratio")
    except OSError as error:
        _failed(f"{error}: check disk and permissions, or set {DEBUG_VARIABLE}=1 for the traceback")
    except Exception as error:
        if _began_with_interrupt(error):
            raise typer.Exit(EXIT_INTERRUPTED) from error
        _failed(f"{type(error).__name__}: {error} (a bug? set {DEBUG_VARIABLE}=1 for the traceback)")


def say_error(message: str) -> None:
    """One line on stderr."""
    say(f"kvzip: error: {message}")


def say(line: str) -> None:
    """One line on stderr, whatever the text holds; a closed stderr is not worth a second error."""
    with suppress(OSError):
        print(one_line(line), file=sys.stderr, flush=True)


def one_line(text: str) -> str:
    """The text on one line, without characters that would act on the terminal."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))


def is_debugging() -> bool:
    return os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")


def _failed(message: str) -> NoReturn:
    if is_debugging():
        traceback.print_exc()
    say_error(message)
    raise typer.Exit(EXIT_FAILED)


def _began_with_interrupt(error: BaseException | None) -> bool:
    """Whether a library made this error out of a Ctrl-C."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _reader_is_gone() -> NoReturn:
    """The reader of our output has left (`| head`): end without a word."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that the interpreter's last flush has somewhere to go
    raise typer.Exit(EXIT_FAILED)
