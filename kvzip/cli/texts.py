"""Texts that the user hands in: a file or standard input, with one clear line for what can't be read."""

from __future__ import annotations

import codecs
import os
import stat
import sys
from pathlib import Path

from kvzip.errors import FileError, InputError

MAX_TEXT_NBYTES = 64 << 20  # far beyond the positions of any model
WIDE_BOMS = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
STDIN = "-"


def read_text(path: str, *, max_nbytes: int = MAX_TEXT_NBYTES) -> str:
    """The text of a file, or of standard input for `-`; a byte-order mark is left out.

    Raises FileError for a file that can't be read or is larger than `max_nbytes`, InputError for one that holds no
    UTF-8 text or nothing but space.
    """
    name = "standard input" if path == STDIN else repr(path)
    return decode_text(_read_bytes(path, name, max_nbytes), name)


def decode_text(data: bytes, name: str) -> str:
    """UTF-8 bytes as text. Raises InputError, with `name` in the message, for binary, non-UTF-8 or blank data."""
    wide = next((bom for bom in WIDE_BOMS if data.startswith(bom)), None)
    if wide is not None:
        encoding = f"UTF-{8 * len(wide)}"
        raise InputError(f"{name} is {encoding} text, expected UTF-8: convert it with `iconv -f {encoding} -t UTF-8`")
    if (at := data.find(0)) >= 0:
        if name.endswith(".kvz'"):
            raise InputError(f"{name} is compressed already: ask it with `kvzip ask`, or give a text")
        raise InputError(f"{name} is binary (byte 0 at offset {at}), expected UTF-8 text: extract its text first")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        remedy = "convert it with `iconv -f ENCODING -t UTF-8`, say -f WINDOWS-1252"
        raise InputError(f"{name} is not UTF-8 ({where}): {remedy}") from error
    if not text.strip():
        what = "holds nothing but space" if text else "is empty"
        raise InputError(f"{name} {what}: give a text of at least one word")
    return text


def _read_bytes(path: str, name: str, max_nbytes: int) -> bytes:
    try:
        if path == STDIN:
            data = sys.stdin.buffer.read(max_nbytes + 1)
        else:
            _check_size(os.stat(path), name, max_nbytes)
            with Path(path).open("rb") as file:
                data = file.read(max_nbytes + 1)  # a pipe or a device has no size to check before
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FileError(f"can't read {name}: {reason}; check the path and its permissions") from error
    if len(data) > max_nbytes:
        raise _too_large(name, f"more than {max_nbytes:,}", max_nbytes)
    return data


def _check_size(status: os.stat_result, name: str, max_nbytes: int) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise FileError(f"{name} is a folder: give a text file, or `-` for standard input")
    if status.st_size > max_nbytes:
        raise _too_large(name, f"{status.st_size:,}", max_nbytes)


def _too_large(name: str, size: str, max_nbytes: int) -> FileError:
    return FileError(
        f"{name} has {size} bytes, at most {max_nbytes:,} are read: no model takes that many tokens; give a part of it"
    )
