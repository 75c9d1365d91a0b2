"""`kvzip chat`: a conversation over a .kvz file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import typer

from kvzip.cli.answers import check_text, show_stream, timing
from kvzip.cli.border import EXIT_FAILED, say_error
from kvzip.cli.compress import check_writable
from kvzip.cli.options import (
    Device,
    DType,
    File,
    MaxNewTokens,
    ModelOrNone,
    Quiet,
    Sampler,
    Seed,
    Temperature,
    TopP,
    examples,
    sampler,
)
from kvzip.cli.screen import Bars, note, out, plural, print_facts, size, wants_notes
from kvzip.errors import InputError, KVZipError, UnknownNameError

if TYPE_CHECKING:
    from kvzip.session import Session

EPILOG = examples(
    "kvzip chat book.kvz",
    "kvzip chat evening.kvz       goes on where /save evening.kvz left off",
    "kvzip chat book.kvz < questions.txt",
)
HELP = """\
/rewind [N]   forget the last turn, or the last N
/reset        forget all turns
/save PATH    write text and conversation to a .kvz file
/stats        what is in memory
/help         this list
/quit         leave, as Ctrl-D does; Ctrl-C stops an answer"""
RECAP_LEN = 100  # characters shown of an earlier question or answer


def chat(
    file: File,
    model: ModelOrNone = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    dtype: DType = "auto",
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Talk with a compressed text; every turn is remembered.

    A file saved by /save goes on where it ended. Without a terminal, each line of stdin is a turn.
    """
    with Bars(quiet) as bars:
        session = open_session(file, model, max_new_tokens, bars, dtype=dtype, device=device)
    room = Room(session, max_new_tokens, sampler(temperature, top_p, seed), notes=wants_notes(quiet))
    if sys.stdin.isatty() and not quiet:
        room.greet()
    failed = room.run(sys.stdin.isatty())
    if failed and not sys.stdin.isatty():
        raise typer.Exit(EXIT_FAILED)


def open_session(file: str, model: str | None, max_new_tokens: int, bars: Bars, *, dtype: str, device: str) -> Session:
    from kvzip.cli.loading import load_llm, model_of, start

    start(bars)
    from kvzip.generation import check_options

    check_options(max_new_tokens, {})
    name = model_of(file, model)
    return load_llm(name, bars, dtype=dtype, device=device).open_session(file)


class Room:
    """Reads lines and acts on them, until one says to leave.

    notes: whether to remark on stderr how fast an answer came.
    """

    def __init__(self, session: Session, max_new_tokens: int, options: Sampler, *, notes: bool = False) -> None:
        self.session, self.max_new_tokens, self.options, self.notes = session, max_new_tokens, options, notes
        self.commands: dict[str, Callable[[str], None]] = {
            "/rewind": self.rewind,
            "/reset": self.reset,
            "/save": self.save,
            "/stats": self.stats,
            "/help": self.help,
        }

    def greet(self) -> None:
        """What the context is, and the turns so far in short."""
        from kvzip.inspect.summary import one_line

        data, console = self.session.context.data, out()
        source = one_line(data.info.source or "a text", 60)
        console.print(f"{source}: {data.context_len:,} tokens, {size(data.kv_nbytes)}. /help lists the commands.")
        for question, answer in self.session.turns:
            console.print(f"\n> {one_line(question, RECAP_LEN)}\n{one_line(answer, RECAP_LEN)}", style="dim")

    def run(self, interactive: bool) -> bool:
        """Serve lines until the end; whether any of them failed. With a person at the keys, Ctrl-C never leaves."""
        read, failed = (read_typed if interactive else sys.stdin.readline), False
        while True:
            try:
                line = read()
                if not line or line.strip() in ("/quit", "/exit"):
                    return failed
                if line.strip():
                    self.take(line.strip())
            except KVZipError as error:
                say_error(str(error))
                failed = True
            except KeyboardInterrupt:
                if not interactive:
                    raise
                note("\n(Ctrl-D or /quit leaves)")

    def take(self, line: str) -> None:
        """Act on one line. Raises what the library raises, and UnknownNameError for an unknown command."""
        if not line.startswith("/"):
            return self.ask(line)
        name, _, argument = line.partition(" ")
        if name not in self.commands:
            raise UnknownNameError.of("command", name, [*self.commands, "/quit"])
        self.commands[name](argument.strip())

    def ask(self, question: str) -> None:
        stream = self.session.stream(check_text(question), max_new_tokens=self.max_new_tokens, **self.options())
        try:
            answer = show_stream(stream)
        except KeyboardInterrupt:
            print(flush=True)
            note("(stopped; what came so far is remembered)")
        else:
            if self.notes:
                note(timing(answer))

    def rewind(self, argument: str) -> None:
        if argument and not argument.isdecimal():
            raise InputError(f"/rewind {argument!r}: give a number of turns, or nothing for the last one")
        self.session.rewind(int(argument or 1))
        self._say_turns()

    def reset(self, argument: str) -> None:
        self.session.rewind(len(self.session.turns))
        self._say_turns()

    def save(self, argument: str) -> None:
        from pathlib import Path

        if not argument:
            raise InputError("/save needs a path: /save evening.kvz")
        path = Path(argument).expanduser()
        check_writable(path)
        out().print(f"saved {path}, {size(self.session.save(path))}", soft_wrap=True)

    def stats(self, argument: str) -> None:
        data, cache = self.session.context.data, self.session.cache
        limit = self.session.context.llm.max_positions
        used = data.logical_len + cache.tail_len
        print_facts(
            [
                ("Context", f"{data.context_len:,} tokens in {size(data.kv_nbytes)}"),
                ("Conversation", f"{plural(len(self.session.turns), 'turn')}, {plural(cache.tail_len, 'token')}"),
                ("Positions", f"{used:,} used" + (f" of {limit:,}" if limit else "")),
            ]
        )

    def help(self, argument: str) -> None:
        print(HELP)

    def _say_turns(self) -> None:
        print(f"{plural(len(self.session.turns), 'turn')} remembered")


def read_typed() -> str:
    """A line from the terminal, with editing and history; "" at its end."""
    with suppress(ImportError):
        import readline  # noqa: F401  # `input` then edits
    try:
        return input("\n> ") + "\n"
    except EOFError:
        print()
        return ""
