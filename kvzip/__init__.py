"""kvzip: compress the KV cache of a text once, ask it any number of questions.

>>> import kvzip
>>> llm = kvzip.load("qwen2.5-coder-0.5b")
>>> context = llm.compress(text, keep_ratio=0.3)
>>> context.ask("Who signed the treaty?")

Nothing heavy is imported before it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvzip._version import __version__
from kvzip.errors import (
    BackendError,
    BudgetError,
    ContextLengthError,
    FetchError,
    FileError,
    FormatError,
    InputError,
    KVZipError,
    MissingExtraError,
    ModelError,
    ModelMismatchError,
    UnknownNameError,
)

if TYPE_CHECKING:
    from kvzip.compressed import CompressedContext
    from kvzip.generation import Answer
    from kvzip.llm import LLM
    from kvzip.loading import load, wrap
    from kvzip.options import CompressOptions
    from kvzip.prefilled import Prefilled
    from kvzip.session import Session

_LAZY = {
    "Answer": "kvzip.generation",
    "CompressOptions": "kvzip.options",
    "CompressedContext": "kvzip.compressed",
    "LLM": "kvzip.llm",
    "Prefilled": "kvzip.prefilled",
    "Session": "kvzip.session",
    "load": "kvzip.loading",
    "wrap": "kvzip.loading",
}

__all__ = [
    "LLM",
    "Answer",
    "BackendError",
    "BudgetError",
    "CompressOptions",
    "CompressedContext",
    "ContextLengthError",
    "FetchError",
    "FileError",
    "FormatError",
    "InputError",
    "KVZipError",
    "MissingExtraError",
    "ModelError",
    "ModelMismatchError",
    "Prefilled",
    "Session",
    "UnknownNameError",
    "__version__",
    "load",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'kvzip' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
