"""Questions in, answers out: what `ask`, `chat` and `demo` share."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Generator
from contextlib import closing
from typing import TYPE_CHECKING, Any

from kvzip.cli.screen import plural, seconds
from kvzip.errors import InputError

if TYPE_CHECKING:
    from kvzip.generation import Answer


def check_text(question: str) -> str:
    """The question, if it is one. Raises InputError for an empty one, or for bytes that are no text."""
    from kvzip.generation import check_question

    check_question(question)
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the question {question!a} is not valid UTF-8: type it in a UTF-8 terminal") from error
    return question


def show_stream(pieces: Generator[str, None, Answer]) -> Answer:
    """Write an answer to stdout as it comes and return it; its generation ends here, whatever happens."""
    clean, begun = _for_terminal() if sys.stdout.isatty() else str, False
    with closing(pieces):
        while True:
            try:
                piece = next(pieces)
            except StopIteration as end:
                print(flush=True)
                answer: Answer = end.value
                return answer
            piece = piece if begun else piece.lstrip()
            begun = begun or bool(piece)
            print(clean(piece), end="", flush=True)


def _for_terminal() -> Callable[[str], str]:
    """Makes pieces of a text printable, and breaks its lines between words."""
    from kvzip.inspect.summary import printable

    wrap = WordWrap(shutil.get_terminal_size().columns)
    return lambda piece: wrap(printable(piece))


class WordWrap:
    """Breaks lines between words, of a text that comes in pieces.  width: columns of the terminal."""

    def __init__(self, width: int) -> None:
        self.width, self.column = width, 0

    def __call__(self, piece: str) -> str:
        return "".join(map(self._place, re.findall(r"\n|[^\S\n]+|\S+", piece)))

    def _place(self, part: str) -> str:
        """One newline, space or word, as it goes to the terminal."""
        from rich.cells import cell_len

        start, self.column = self.column, self.column + cell_len(part)
        if part == "\n":
            self.column = 0
        elif part.isspace() and start and self.column >= self.width:
            return ""  # the next word begins a line
        elif start and self.column > self.width:
            self.column = cell_len(part)
            return "\n" + part
        return part


def answer_json(question: str, answer: Answer) -> dict[str, Any]:
    """One answer of `--json`. The keys are a contract."""
    fetched = answer.fetched
    return {
        "question": question,
        "answer": str(answer),
        "num_new_tokens": answer.num_new_tokens,
        "ttft_s": answer.ttft_s,
        "tpot_s": answer.tpot_s,
        "fetched_nbytes_per_step": None if fetched is None else fetched.nbytes / max(1, fetched.num_steps),
    }


def timing(answer: Answer) -> str:
    """ "24 tokens, the first after 85 ms, then 31 a second"."""
    further = f", then {1 / answer.tpot_s:.0f} a second" if answer.tpot_s else ""
    return f"{plural(answer.num_new_tokens, 'token')}, the first after {seconds(answer.ttft_s)}{further}"
