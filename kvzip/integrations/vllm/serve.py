"""Starting vLLM's server with the plugin: what is checked before, and a process group that ends as one."""

from __future__ import annotations

import errno
import os
import signal
import socket
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from kvzip.errors import InputError, ModelError
from kvzip.integrations.vllm import PARAMETER, SUFFIX, check_version, installed
from kvzip.integrations.vllm.library import Entry, Library, RefusedRequest, too_large

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
POLL_S = 0.2
GRACE_S = 30.0  # for the server to end by itself, and then for what it left
LEFT_GRACE_S = 5.0


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
    found = (path.relative_to(folder) for path in folder.rglob(f"*{SUFFIX}"))
    return sorted(p.as_posix().removesuffix(SUFFIX) for p in found if not any(x.startswith(".") for x in p.parts))


def run(command: Sequence[str], url: str, when_ready: Callable[[], None], *, grace_s: float = GRACE_S) -> int:
    """Run a server until it ends or this process is told to; its exit code, or 128 + the signal.

    url: where it answers /health once it serves; `when_ready` is called then.  grace_s: that it has to end by itself.
    It runs in a process group of its own, of which nothing is left when this returns.
    """
    with noted_signals() as caught:
        process = subprocess.Popen(command, start_new_session=True)
        try:
            code = _watch(process, url, when_ready, caught)
            if caught:
                process.terminate()
                _wait(lambda: process.poll() is not None or len(caught) > 1, grace_s)
        finally:
            end_group(process)
    return 128 + caught[0] if caught else code if code >= 0 else 128 - code


def _watch(process: subprocess.Popen[bytes], url: str, when_ready: Callable[[], None], caught: list[int]) -> int:
    """Until it ended or a signal came; the exit code, if it has one."""
    is_ready = False
    while (code := process.poll()) is None and not caught:
        if not is_ready and (is_ready := answers(url)):
            when_ready()
        time.sleep(POLL_S)
    return code or 0


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """The signals that came while the block runs, which would end this process otherwise."""
    caught: list[int] = []
    deadly = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # as under nohup
    before = {number: signal.signal(number, lambda number, _: caught.append(number)) for number in deadly}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def answers(url: str) -> bool:
    """Whether a server answers /health."""
    insecure = ssl._create_unverified_context()  # it is our own server, by an address its certificate need not have
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=insecure))
    with suppress(OSError), opener.open(f"{url}/health", timeout=2) as answer:
        return bool(answer.status == 200)
    return False


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End all processes of its group, and see to it that they are gone."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if is_running(process.pid):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)
            _wait(lambda: process.poll() is not None and not is_running(process.pid), LEFT_GRACE_S)


def is_running(group: int) -> bool:
    """Whether a process of the group runs; one that ended and was not collected yet does not."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, own = stat.read_text(errors="replace").rpartition(")")[2].split()[:3]
            if int(own) == group and state not in "ZX":
                return True
    return False


def _wait(is_done: Callable[[], bool], timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not is_done() and time.monotonic() < end:
        time.sleep(POLL_S)
