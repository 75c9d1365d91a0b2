"""The store: a folder of .kvz files that requests name. Needs no vLLM."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kvzip import store
from kvzip.errors import FileError, InputError
from kvzip.integrations.vllm import SUFFIX
from kvzip.store import portable
from kvzip.store.refusal import short

PORTABLE = ".kvp"
SUFFIXES = (SUFFIX, PORTABLE)  # in the order they are looked for
MAX_NAME = 255
DEFAULT_LIMIT = 4 << 30
OPTIONS = ("store", "max_context_bytes")
NEEDS_PROMPT_LOGPROBS = "prompt_logprobs and echo need the tokens of the context: leave them out"
HAS_EMBEDS = "prompt embeddings are not served with a context: send text or token ids"
HAS_MEDIA = "images or audio are not served with a context: leave them out"


class RefusedRequest(Exception):
    """Why one request can't be served, in one line. Only that request ends."""


class MissingContext(RefusedRequest):
    """There is no file of that name."""


def too_large(name: str, nbytes: int, limit: int) -> str:
    """Why a context of `nbytes` can't be opened."""
    return (
        f"context {short(name)} takes {nbytes} bytes, more than the {limit} that contexts may: raise "
        "max_context_bytes, or compress it further"
    )


@dataclass(frozen=True)
class Entry:
    """A context of the store, by its header.

    name: as requests say it.  path: the file.  key: sha256 of its contents, which is what it is known by: a file that
    was replaced is another context.  logical_len: positions that prefix and context take.  nbytes: of its pairs.
    num_slots: tokens that it takes in the paged cache, of a portable file; None = a handle stands for it.
    """

    name: str
    path: Path
    key: str
    logical_len: int
    nbytes: int
    num_slots: int | None = None


class Library:
    """Finds contexts by name and refuses those that can't be served.

    folder: looked at anew for each request, so files may come and go.  fingerprint: of the model that is served.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        self._known: dict[str, tuple[tuple[int, ...], Entry]] = {}

    def find(self, name: object) -> Entry:
        """The context of that name: the file of that name, or with one of `SUFFIXES`. Raises RefusedRequest."""
        checked = checked_name(name)
        for suffix in ("",) if checked.endswith(SUFFIXES) else SUFFIXES:
            if (found := self._found(checked + suffix)) is not None:
                return found
        raise MissingContext(f"no context {short(checked)} in the store: check the name, or add its file")

    def _found(self, name: str) -> Entry | None:
        path = self.folder / name
        try:
            seen = os.stat(path)
        except (OSError, ValueError):
            return None
        identity = (seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)
        known = self._known.get(name)
        if known is None or known[0] != identity:
            self._known[name] = known = identity, self._read(name.removesuffix(SUFFIX), path)
        return known[1]

    def _read(self, name: str, path: Path) -> Entry:
        try:
            found = portable.read_info(path) if name.endswith(PORTABLE) else store.read_info(path)
        except FileError as error:  # clients need not know where the store is
            raise RefusedRequest(str(error).replace(repr(str(path)), f"context {short(name)}")) from None
        if found.info.fingerprint != self.fingerprint:
            raise RefusedRequest(
                f"context {short(name)} was made with {short(found.info.model)} ({short(found.info.fingerprint)}), but "
                f"this server runs {short(self.fingerprint)}: ask a server of its model, or compress the text again"
            )
        if isinstance(found, portable.PortableInfo):
            return Entry(name, path, found.sha256, found.logical_len, found.kv_nbytes, found.num_pairs)
        if kind := unservable(found):
            raise RefusedRequest(f"context {short(name)} {kind}: ask it with `kvzip ask`, or compress it without")
        return Entry(name, path, found.sha256, found.prefix_len + found.context_len, found.kv_nbytes)


def options_of(extra: Mapping[str, object]) -> tuple[Path, int]:
    """Store and byte limit of a kv_connector_extra_config. Raises InputError."""
    if unknown := sorted(extra.keys() - set(OPTIONS)):
        raise InputError(f"kv_connector_extra_config has {short(unknown[0])}, allowed: {', '.join(OPTIONS)}")
    folder, limit = extra.get("store"), extra.get("max_context_bytes", DEFAULT_LIMIT)
    if not isinstance(folder, str) or not Path(folder).is_dir():
        raise InputError(f"the store {short(str(folder))} is no folder: give one in kv_connector_extra_config")
    if type(limit) is not int or limit < 1:
        raise InputError(f"max_context_bytes is {short(str(limit))}, expected a whole number of bytes above 0")
    return Path(folder).resolve(), limit


def unservable(info: store.FileInfo) -> str:
    """What in a file this plugin does not compute, or ""."""
    if info.storage.shared:
        return "has layers that share pairs"
    return "has clusters whose pairs are fetched" if info.storage.clusters else ""


def checked_name(name: object) -> str:
    """A name below the folder. Raises RefusedRequest."""
    if not isinstance(name, str):
        raise RefusedRequest(f"the name of a context is {type(name).__name__}, expected a string")
    if len(name) > MAX_NAME or "\0" in name or any(not part or part.startswith(".") for part in name.split("/")):
        raise RefusedRequest(f"{short(name)} is no name of a context: give that of a file below the store")
    return name
