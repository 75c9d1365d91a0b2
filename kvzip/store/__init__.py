"""The .kvz file: a compressed context, and maybe the tail of a session, as one safetensors file.

    write(path, context, tail) ──► file ──► read(path) ──► context, tail

`docs/file-format.md` is the format itself. A file is written whole or not at all. Reading maps the tensors
into memory and runs no code; whatever the file holds, the outcome is the context that was written, or an error.
"""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from kvzip.context import ContextInfo, RaggedContext, SavedTail
from kvzip.errors import InputError, ModelMismatchError
from kvzip.store.checks import check_contents, check_header
from kvzip.store.files import StrPath, digest, opened, os_error, specs_in, specs_of, store_tensors
from kvzip.store.layout import FileInfo, Storage
from kvzip.store.refusal import REMAKE, Refused, one_line, short
from kvzip.store.tensors import context_of, metadata_of, storage_of, tail_of, tensors_of

__all__ = ["FileInfo", "Storage", "check_fingerprint", "mapped", "read", "read_info", "write"]


def write(path: StrPath, context: RaggedContext, tail: SavedTail | None = None) -> int:
    """Store a context, and the tail of a session if given; returns the bytes written.

    The file appears whole, in place of an older one, or not at all: on any failure the older file stays.
    Tensors come to the host a few at a time. The same context gives the same bytes.
    Raises FileError if the folder or the disk refuses, InputError if the parts of the context do not fit.
    """
    storage = storage_of(context)
    tensors = tensors_of(context, tail, storage)
    try:
        specs, metadata = specs_of(tensors), metadata_of(context, tail, storage)
        checked = check_header(metadata, specs)
        check_contents(tensors, checked.windows, checked.storage)
        return store_tensors(path, metadata, specs, tensors)
    except (Refused, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"can't store this context: {one_line(error)}; compress the text again") from error


def read(path: StrPath, *, verify: bool = True) -> tuple[RaggedContext, SavedTail | None]:
    """Open a stored context, and the tail stored beside it.

    Tensors are mapped from the file and loaded by the page when first touched; the file is never written to.
    verify: compare the sha256, which reads the whole file once.
    Raises FileError (no such file, no permission), FormatError (not ours, damaged, or of a later format).
    """
    with opened(path) as mapped:
        metadata, specs = mapped.metadata() or {}, specs_in(mapped)
        header = check_header(metadata, specs)
        tensors: dict[str, Tensor] = {name: mapped.get_tensor(name) for name in specs}
        if verify and metadata.get("sha256") != digest(metadata, specs, tensors):
            raise Refused("its sha256 does not match its contents, so it is damaged")
        check_contents(tensors, header.windows, header.storage)
        return context_of(tensors, header), tail_of(tensors, header)


def mapped(context: RaggedContext, folder: Path) -> RaggedContext:
    """The same context, its tensors in a file of `folder` that has no name any more and goes with the process.

    Where the system does not remove a file that is in use, it stays in the folder. Raises FileError.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise os_error("make the folder", folder, error) from error
    path = folder / f"{uuid.uuid4().hex}.kvz"
    write(path, context)
    try:
        return read(path, verify=False)[0]
    finally:
        with suppress(OSError):
            path.unlink()


def read_info(path: StrPath) -> FileInfo:
    """What the header of a file says; the tensors are neither read nor verified. Raises as `read` does."""
    with opened(path) as mapped:
        return check_header(mapped.metadata() or {}, specs_in(mapped))


def check_fingerprint(info: ContextInfo, fingerprint: str, path: StrPath) -> None:
    """Refuse a file that another model or tokenizer made. Raises ModelMismatchError."""
    if info.fingerprint != fingerprint:
        made_with = f"{short(info.model)} ({short(info.fingerprint)}), but the loaded model is {short(fingerprint)}"
        remedy = f"load the model of the file, or {REMAKE}"
        raise ModelMismatchError(f"{os.fspath(path)!r} was made with {made_with}; {remedy}")
