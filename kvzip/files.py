"""Reading what users give, and writing files whole."""

from __future__ import annotations

import os
from pathlib import Path

from kvzip.errors import FileError, InputError


def read_utf8(path: str | Path) -> str:
    """The text of a UTF-8 file. Raises InputError where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} can't be read as UTF-8 text ({error}): give a text file") from error


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file, whole or not at all; what stood there stays until then. Raises FileError."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        if target.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        try:
            temporary.write_bytes(content)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        reason = "its folder does not exist" if isinstance(error, FileNotFoundError) else error.strerror
        raise FileError(f"can't write {str(path)!r}: {reason}; give a file in a folder you can write to") from error
