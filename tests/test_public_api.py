"""The public surface: these names, each explained, each signature typed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest

import kvzip

PUBLIC = [
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
OBJECTS = [name for name in PUBLIC if name != "__version__"]
ERRORS = [name for name in OBJECTS if name.endswith("Error")]


def test_the_public_names_are_these() -> None:
    assert kvzip.__all__ == PUBLIC
    assert dir(kvzip) == sorted(PUBLIC)
    assert isinstance(kvzip.__version__, str)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        _ = kvzip.compres


@pytest.mark.parametrize("name", OBJECTS)
def test_every_public_name_is_explained(name: str) -> None:
    text = vars(getattr(kvzip, name)).get("__doc__") or getattr(kvzip, name).__doc__
    assert text and text.strip(), f"{name} has no docstring"
    assert not text.startswith(f"{name}("), f"{name} has only the docstring that its dataclass made"


@pytest.mark.parametrize("name", OBJECTS)
def test_every_public_method_is_explained(name: str) -> None:
    silent = [
        member for member, function in members(getattr(kvzip, name)) if member != "__init__" and not function.__doc__
    ]
    assert not silent, f"{name}: no docstring on {silent}"


@pytest.mark.parametrize("name", OBJECTS)
def test_every_public_signature_is_typed(name: str) -> None:
    for member, function in members(getattr(kvzip, name)):
        signature = inspect.signature(function)
        untyped = [p.name for p in signature.parameters.values() if p.annotation is p.empty]
        assert set(untyped) <= {"self", "cls"}, f"{name}.{member}: {untyped} have no type"
        assert signature.return_annotation is not signature.empty, f"{name}.{member} does not say what it returns"


@pytest.mark.parametrize("name", ERRORS)
def test_every_error_is_in_the_tree_and_in_its_drawing(name: str) -> None:
    from kvzip import errors

    assert issubclass(getattr(kvzip, name), kvzip.KVZipError)
    assert name in (errors.__doc__ or "")


def members(thing: Any) -> Iterator[tuple[str, Any]]:
    """A function itself; of a class its own public methods and properties, and its constructor where it wrote one."""
    if not inspect.isclass(thing):
        yield "", thing
        return
    for name, value in vars(thing).items():
        inner = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        is_made = name == "__init__" and hasattr(thing, "__dataclass_fields__")
        if inspect.isfunction(inner) and (not name.startswith("_") or name == "__init__") and not is_made:
            yield name, inner
