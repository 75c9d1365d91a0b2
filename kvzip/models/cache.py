"""Where fetched and converted models are kept, and how a folder appears there whole or not at all."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from kvzip.errors import FetchError
from kvzip.progress import Progress, silent

MODELS = "models-1"  # count up when a conversion changes: folders of older versions are then made anew
FREE_SPACE = "free some space, or set KVZIP_CACHE to a folder on another disk"


def cache_dir() -> Path:
    """The cache folder of kvzip: $KVZIP_CACHE, or `kvzip` in the user's cache folder. It may not exist yet."""
    if own := os.environ.get("KVZIP_CACHE"):
        return Path(own).expanduser()
    return _user_cache() / "kvzip"


def _user_cache() -> Path:
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base)
    if sys.platform == "win32" and (base := os.environ.get("LOCALAPPDATA")):
        return Path(base)
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")


def model_folder(name: str) -> Path:
    """Where the Hugging Face folder of a model is kept, fetched or not."""
    return cache_dir() / MODELS / name


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds a model (folders are renamed into place whole, so its configuration says so)."""
    return (folder / "config.json").is_file()


def build_once(
    folder: Path, build: Callable[[Path, Path], None], *, nbytes: int = 0, progress: Progress | None = None
) -> Path:
    """`folder`, made by `build(target, scratch)` unless it is complete already.

    `target` is the folder to fill (not made yet) and `scratch` one for other files; both are on the disk of
    the cache. Of several processes one builds and the others wait. `folder` appears by one rename after
    `build` returned; whatever ends `build` early leaves nothing. nbytes: free bytes that it needs.
    Raises FetchError for a cache that can't be written or a disk that is or would be full.
    """
    if is_complete(folder):
        return folder
    with _disk_errors(folder.parent), _locked(folder, progress or silent):
        if not is_complete(folder):
            _remove_stale(folder)
            _check_space(folder.parent, nbytes)
            with tempfile.TemporaryDirectory(prefix=_prefix(folder), dir=folder.parent) as scratch:
                target = Path(scratch) / "folder"
                build(target, Path(scratch))
                os.replace(target, folder)
    return folder


def _prefix(folder: Path) -> str:
    return f".{folder.name}-"


@contextmanager
def _disk_errors(root: Path) -> Iterator[None]:
    """Makes the cache folder, and turns what the disk refuses into a FetchError that says the remedy."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        remedy = FREE_SPACE if "No space left" in reason else "set KVZIP_CACHE to a folder that can be written"
        raise FetchError(f"can't fill the cache folder {root} ({reason}): {remedy}") from error


@contextmanager
def _locked(folder: Path, report: Progress) -> Iterator[None]:
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report("waiting for another process", 0, None)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _remove_stale(folder: Path) -> None:
    """Remove what a killed process left; only call it with the lock held."""
    for stale in [folder, *folder.parent.glob(_prefix(folder) + "*")]:
        if stale.is_dir():
            shutil.rmtree(stale, ignore_errors=True)


def _check_space(root: Path, nbytes: int) -> None:
    free = shutil.disk_usage(root).free
    if free < nbytes:
        raise FetchError(
            f"not enough disk space in {root}: {nbytes / 2**30:.1f} GiB needed, {free / 2**30:.1f} GiB free;"
            f" {FREE_SPACE}"
        )
