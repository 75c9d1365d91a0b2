"""A server as a process group that ends as one, and the process that watches it, which stays small."""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
POLL_S = 0.2
GRACE_S = 30.0  # for the server to end by itself
LEFT_GRACE_S = 5.0  # for what it left


def watch(command: Sequence[str], url: str, usage: str, *, grace_s: float = GRACE_S) -> NoReturn:
    """Go on as a process that does nothing but `run` and `print`, without the libraries that were loaded so far."""
    sys.stdout.flush()
    sys.stderr.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until `run` can note them
    os.execv(sys.executable, [sys.executable, "-m", __name__, json.dumps([command, url, usage, grace_s])])


def main() -> None:
    """What `watch` starts."""
    command, url, usage, grace_s = json.loads(sys.argv[1])

    def say_usage() -> None:
        with suppress(OSError):  # nobody reads it
            print(usage, flush=True)

    sys.exit(run(command, url, say_usage, grace_s=grace_s))


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
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
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


if __name__ == "__main__":
    main()
