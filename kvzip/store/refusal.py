"""Refusals: why a file, or a context that is to become one, can't be used, in one line."""

from __future__ import annotations

REMAKE = "make the file again with `kvzip compress`"


class Refused(Exception):
    """Why a file, or a context that is to become one, can't be used.

    remedy: None = make the file again, in the way of its kind.
    """

    def __init__(self, reason: str, remedy: str | None = None) -> None:
        super().__init__(reason)
        self.remedy = remedy


def short(text: str) -> str:
    """A text in quotes, without its middle where it is long."""
    return repr(text if len(text) <= 48 else f"{text[:28]}...{text[-16:]}")


def one_line(error: Exception) -> str:
    """What an error says, on one line that is not too long."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:297]}..."
