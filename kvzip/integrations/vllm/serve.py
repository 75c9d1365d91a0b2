"""What is checked before vLLM's server starts with the plugin."""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from kvzip.errors import InputError, ModelError
from kvzip.integrations.vllm import PARAMETER, SUFFIX, check_version, installed
from kvzip.integrations.vllm.library import SUFFIXES, Entry, Library, RefusedRequest, too_large


def check_environment() -> str:
    """The package that vLLM comes from. Raises MissingExtraError or ModelError where it can't load the plugin."""
    check_version()
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PARAMETER not in allowed.split(","):
        raise ModelError(f"VLLM_PLUGINS is {allowed!r}, which leaves the plugin out: add {PARAMETER}, or unset it")
    if PARAMETER not in {point.name for point in entry_points(group="vllm.general_plugins")}:
        raise ModelError("vLLM does not find the plugin: install kvzip beside it, pip install 'kvzip[vllm]'")
    return installed()[0]


def check_port(host: str, port: int) -> None:
    """Raises InputError where nobody could listen there now."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        remedy = "take another --port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "check --host"
        raise InputError(f"can't listen on {host}:{port}: {error.strerror or error}; {remedy}") from error


@dataclass(frozen=True)
class Survey:
    """The contexts of a store.  fitting: that the model can be asked about.  refused: (name, reason) of the others."""

    fitting: tuple[Entry, ...]
    refused: tuple[tuple[str, str], ...]


def survey(library: Library, limit: int, max_positions: int | None) -> Survey:
    """What is in the store now, by the headers.  limit: bytes that contexts may take.

    max_positions: of the model, or None. Raises InputError for a store that can't be listed.
    """
    fitting, refused = [], []
    for name in names_in(library.folder):
        try:
            entry = library.find(name)
            if entry.nbytes > limit:
                raise RefusedRequest(too_large(name, entry.nbytes, limit))
            if max_positions is not None and entry.logical_len >= max_positions:
                raise RefusedRequest(
                    f"it takes {entry.logical_len} of the {max_positions} positions of the model, which leaves none "
                    "for a question: compress a shorter text"
                )
            fitting.append(entry)
        except RefusedRequest as refusal:
            refused.append((name, str(refusal)))
    return Survey(tuple(fitting), tuple(refused))


def names_in(folder: Path) -> list[str]:
    """Names of all contexts below a store. Raises InputError."""
    if not folder.is_dir():
        raise InputError(f"the store {str(folder)!r} is no folder: make it, or give the folder of the .kvz files")
    try:
        os.listdir(folder)
    except OSError as error:
        raise InputError(f"the store {str(folder)!r} can't be read: {error.strerror}; check its permissions") from error
    found = (path.relative_to(folder) for suffix in SUFFIXES for path in folder.rglob(f"*{suffix}"))
    return sorted(p.as_posix().removesuffix(SUFFIX) for p in found if not any(x.startswith(".") for x in p.parts))
