"""The store: a folder of .kvz files that requests name. Needs no vLLM."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from kvzip import store
from kvzip.errors import FileError
from kvzip.integrations.vllm import SUFFIX
from kvzip.store.refusal import short

MAX_NAME = 255


class RefusedRequest(Exception):
    """Why one request can't be served, in one line. Only that request ends."""


@dataclass(frozen=True)
class Entry:
    """A context of the store, by its header.

    name: as requests say it.  path: the file.  key: sha256 of its contents, which is what it is known by: a file that
    was replaced is another context.  logical_len: positions that prefix and context take.  nbytes: of its pairs.
    """

    name: str
    path: Path
    key: str
    logical_len: int
    nbytes: int


class Library:
    """Finds contexts by name and refuses those that can't be served.

    folder: looked at anew for each request, so files may come and go.  fingerprint: of the model that is served.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        self._known: dict[str, tuple[tuple[int, ...], Entry]] = {}

    def find(self, name: object) -> Entry:
        """The context of that name. Raises RefusedRequest."""
        path = self.folder / f"{checked_name(name)}{SUFFIX}"
        try:
            seen = os.stat(path)
        except (OSError, ValueError):
            raise RefusedRequest(
                f"no context {short(str(name))} in the store: check the name, or add its file"
            ) from None
        identity = (seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)
        known = self._known.get(str(name))
        if known is None or known[0] != identity:
            self._known[str(name)] = known = identity, self._read(str(name), path)
        return known[1]

    def _read(self, name: str, path: Path) -> Entry:
        try:
            found = store.read_info(path)
        except FileError as error:
            raise RefusedRequest(str(error)) from None
        if found.info.fingerprint != self.fingerprint:
            raise RefusedRequest(
                f"context {short(name)} was made with {short(found.info.model)} ({short(found.info.fingerprint)}), but "
                f"this server runs {short(self.fingerprint)}: ask a server of its model, or compress the text again"
            )
        if kind := unservable(found):
            raise RefusedRequest(f"context {short(name)} {kind}: ask it with `kvzip ask`, or compress it without")
        return Entry(name, path, found.sha256, found.prefix_len + found.context_len, found.kv_nbytes)


def unservable(info: store.FileInfo) -> str:
    """What in a file this plugin does not compute, or ""."""
    if info.storage.shared:
        return "has layers that share pairs"
    return "has clusters whose pairs are fetched" if info.storage.clusters else ""


def checked_name(name: object) -> str:
    """A name below the folder, without the suffix. Raises RefusedRequest."""
    if not isinstance(name, str):
        raise RefusedRequest(f"the name of a context is {type(name).__name__}, expected a string")
    parts = name.split("/")
    if len(name) > MAX_NAME or "\0" in name or any(not part or part.startswith(".") for part in parts):
        raise RefusedRequest(f"{short(name)} is no name of a context: give a file below the store, without {SUFFIX}")
    return name.removesuffix(SUFFIX)
