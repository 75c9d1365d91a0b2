"""Everything kvzip raises on purpose.

KVZipError
├── InputError (ValueError)       a value the caller gave can't be used
│   ├── BudgetError               keep ratio or budget out of range
│   ├── ContextLengthError        the text does not fit the positions of the model
│   └── UnknownNameError          no model, method, budget or backend of that name
├── ModelError                    a model that can't be loaded, or whose attention can't be served
│   └── FetchError                a catalogue model that could not be fetched or checked
├── BackendError                  an attention backend that can't run on this machine
├── FileError                     a file that can't be read or written
│   ├── FormatError               not a .kvz file, damaged, or of another format version
│   └── ModelMismatchError        a .kvz file of another model or tokenizer
└── MissingExtraError             an optional dependency that is not installed

Each message is one line that names the value, what is allowed, and the remedy.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KVZipError(Exception):
    """Base of all errors that kvzip raises on purpose."""


class InputError(KVZipError, ValueError):
    """A value the caller gave can't be used."""


class BudgetError(InputError):
    """A keep ratio or a budget is out of range."""


class ContextLengthError(InputError):
    """The text does not fit the positions of the model."""


class UnknownNameError(InputError):
    """No model, method, budget or backend has that name."""

    @classmethod
    def of(cls, kind: str, name: str, known: Iterable[str], remedy: str = "") -> UnknownNameError:
        """The error for an unknown `name`, with the nearest of the `known` names and all of them."""
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        tail = f"; {remedy}" if remedy else ""
        return cls(f"unknown {kind} {name!r}: {hint}known: {', '.join(names)}{tail}")


class ModelError(KVZipError):
    """A model can't be loaded, or its attention can't be served."""


class FetchError(ModelError):
    """A catalogue model could not be fetched or checked."""


class BackendError(KVZipError):
    """An attention backend can't run on this machine."""


class FileError(KVZipError):
    """A file can't be read or written."""


class FormatError(FileError):
    """Not a .kvz file, a damaged one, or one of another format version."""


class ModelMismatchError(FileError):
    """A .kvz file that was made with another model or tokenizer."""


class MissingExtraError(KVZipError, ImportError):
    """An optional dependency is not installed."""

    @classmethod
    def of(cls, package: str, extra: str) -> MissingExtraError:
        """The error for a missing `package` that `pip install kvzip[extra]` brings."""
        return cls(f"{package} is not installed: pip install 'kvzip[{extra}]'")
