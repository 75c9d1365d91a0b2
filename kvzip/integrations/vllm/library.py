"""The store: a folder of .kvz files that requests name. Needs no vLLM."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kvzip import store
from kvzip.errors import FileError, InputError
from kvzip.integrations.vllm import SUFFIX
from kvzip.store.refusal import short

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
            raise MissingContext(
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
        except FileError as error:  # clients need not know where the store is
            raise RefusedRequest(str(error).replace(repr(str(path)), f"context {short(name)}")) from None
        if found.info.fingerprint != self.fingerprint:
            raise RefusedRequest(
                f"context {short(name)} was made with {short(found.info.model)} ({short(found.info.fingerprint)}), but "
                f"this server runs {short(self.fingerprint)}: ask a server of its model, or compress the text again"
            )
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
    """A name below the folder, without the suffix. Raises RefusedRequest."""
    if not isinstance(name, str):
        raise RefusedRequest(f"the name of a context is {type(name).__name__}, expected a string")
    parts = name.split("/")
    if len(name) > MAX_NAME or "\0" in name or any(not part or part.startswith(".") for part in parts):
        raise RefusedRequest(f"{short(name)} is no name of a context: give a file below the store, without {SUFFIX}")
    return name.removesuffix(SUFFIX)
