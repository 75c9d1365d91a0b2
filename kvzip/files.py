"""Reading what users give."""

from __future__ import annotations

from pathlib import Path

from kvzip.errors import InputError


def read_utf8(path: str | Path) -> str:
    """The text of a UTF-8 file. Raises InputError where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} can't be read as UTF-8 text ({error}): give a text file") from error
