"""Rows of published data sets: a local copy of the user, or the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from kvzip.errors import InputError, MissingExtraError
from kvzip.files import read_utf8

Rows = Iterable[dict[str, Any]]
TIMEOUT_S = 10
LOCAL_COPY = "a local copy of the set (.parquet, .json, .jsonl or a folder of save_to_disk)"


def rows(repo: str, config: str | None, split: str, path: str | None, task: str) -> Rows:
    """The rows of a data set in order, to be gone through any number of times.

    path: a local copy, read as it is; None: `config` and `split` of `repo` on the hub, or what `datasets` keeps of it
    from an earlier run where the hub does not answer.  task: whose data it is, for the messages.
    Raises MissingExtraError where `datasets` is needed and not installed, InputError where there are no rows.
    """
    try:
        return _from_hub(repo, config, split) if path is None else _from_copy(Path(path), split)
    except MissingExtraError:
        raise
    except Exception as error:  # the library lets through those of pyarrow, fsspec, httpx and others
        wanted = path or " ".join(filter(None, (repo, config, split)))
        remedy = f"give --data {task}=FILE with {LOCAL_COPY}"
        raise InputError(f"{wanted} can't be read as a data set ({_reason(error)}): {remedy}") from error


def _from_copy(path: Path, split: str) -> Rows:
    if not path.exists():
        raise InputError("there is no such file or folder")
    if path.suffix in (".json", ".jsonl"):  # with json itself: pyarrow wants the same type in all rows
        return _from_json(read_utf8(path))
    datasets = _library()
    if path.is_dir():
        found = datasets.load_from_disk(str(path))
        if isinstance(found, datasets.DatasetDict):
            return next(iter(found.values())) if len(found) == 1 else found[split]
        return found
    if path.suffix != ".parquet":
        raise InputError(f"unknown ending {path.suffix!r}")
    from pyarrow import parquet

    return datasets.Dataset(parquet.read_table(path))  # from_parquet would leave a second copy in the user's cache


def _from_json(text: str) -> Rows:
    lines = (line for line in text.split("\n") if line.strip())
    found = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in lines]
    if not (found and all(isinstance(row, dict) for row in found)):
        raise InputError("it is no list of objects")
    return found


def _from_hub(repo: str, config: str | None, split: str) -> Rows:
    datasets = _library()
    with _quiet(datasets):
        before = datasets.config.HF_HUB_OFFLINE
        datasets.config.HF_HUB_OFFLINE = before or not _answers(repo)  # else it tries again for half a minute
        try:
            return datasets.load_dataset(repo, config, split=split)
        finally:
            datasets.config.HF_HUB_OFFLINE = before


def _answers(repo: str) -> bool:
    """Whether the hub answers at all: one request, no second try."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().dataset_info(repo, timeout=TIMEOUT_S)
    except HfHubHTTPError as error:
        return error.response.status_code < 500
    except Exception:  # whichever HTTP library the hub's client is built on
        return False
    return True


def _library() -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError.of("datasets", "eval") from error
    return datasets


@contextmanager
def _quiet(datasets: ModuleType) -> Iterator[None]:
    """Without the progress bars and warnings of `datasets` and `huggingface_hub`."""
    from huggingface_hub import utils as hub

    libraries = [datasets, hub]
    bars = [library for library in libraries if not library.are_progress_bars_disabled()]
    levels = [library.logging.get_verbosity() for library in libraries]
    for library in libraries:
        library.disable_progress_bars()
        library.logging.set_verbosity_error()
    try:
        yield
    finally:
        for library in bars:
            library.enable_progress_bars()
        for library, level in zip(libraries, levels, strict=True):
            library.logging.set_verbosity(level)


def _reason(error: Exception) -> str:
    if isinstance(error, ConnectionError):
        return "the hub can't be reached"
    text = str(error).strip().split("\n")[0].rstrip(".")
    return f"{text[:157]}..." if len(text) > 160 else text or type(error).__name__
