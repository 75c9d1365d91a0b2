"""Models and tokenizers for the commands."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvzip.cli import ending_at_once
from kvzip.cli.border import is_debugging
from kvzip.cli.screen import Bars
from kvzip.errors import ContextLengthError

if TYPE_CHECKING:
    from kvzip.llm import LLM

QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_VERBOSITY": "error"}


def quiet_libraries() -> None:
    """Keep the libraries below from writing about themselves. Call it before they are imported."""
    if is_debugging():
        return
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")


def start(bars: Bars) -> None:
    """Import the libraries that all work with models needs; it takes seconds, so it is done once and says so."""
    quiet_libraries()
    with bars.step("Starting"), ending_at_once():
        from transformers.utils import logging

        import kvzip.loading
        import kvzip.store  # noqa: F401

        if not is_debugging():
            logging.disable_progress_bar()


def load_llm(name: str, bars: Bars, *, dtype: str = "auto", device: str = "auto", backend: str = "auto") -> LLM:
    """The model of that name. Raises as `kvzip.load` does."""
    start(bars)
    from kvzip.loading import load

    with bars.step(f"Loading {name}"):
        return load(stable_name(name), dtype=dtype, device=device, backend=backend, progress=bars)


def model_of(file: str, model: str | None) -> str:
    """`model`, or the name that the file gives. Raises FormatError or FileError for a file that can't be used."""
    from kvzip.store import read_info

    return model or read_info(file).info.model


def stable_name(name: str) -> str:
    """The name as it can stand in a file: a local folder or file by its full path, anything else as it is."""
    path = Path(name).expanduser()
    is_local = name and "\0" not in name and path.exists() and not _is_catalogue_name(name)
    return str(path.resolve()) if is_local else name


def load_tokenizer(name: str) -> Any | None:
    """The tokenizer of a model that is on this machine already, or None. Nothing is fetched or converted."""
    quiet_libraries()
    with ending_at_once():
        from transformers import AutoTokenizer

    folder = _local_model(name)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True) if folder else None
    except Exception:  # whatever is wrong with it, the caller can do without
        return None


def check_can_fit(llm: LLM, text: str) -> None:
    """Refuse, without tokenizing, a text that is too long however it is cut into tokens. Raises ContextLengthError."""
    if llm.max_positions is None:
        return
    longest = max(map(len, llm.tokenizer.get_vocab()), default=1)  # a character of a token is at most one of the text
    if len(text) > llm.max_positions * longest:
        raise ContextLengthError(
            f"the text has {len(text):,} characters, far more than the {llm.max_positions:,} positions of "
            f"{llm.name} can take: give a part of it, or take another model"
        )


def _is_catalogue_name(name: str) -> bool:
    from kvzip.models.catalogue import CATALOGUE

    return name in CATALOGUE


def _local_model(name: str) -> str | None:
    """A folder, or an id of the hub's own cache."""
    from kvzip.models.fetch import hash_file, is_complete, model_folder
    from kvzip.progress import silent

    path = Path(name).expanduser()
    if _is_catalogue_name(name):
        folder = model_folder(name)
    elif path.suffix.lower() == ".gguf" and path.is_file():
        folder = model_folder(f"gguf-{hash_file(path, silent)[:16]}")
    elif path.is_dir():
        folder = path
    else:
        return name if name.count("/") == 1 else None
    return str(folder) if is_complete(folder) else None
