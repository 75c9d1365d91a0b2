"""Parts of a method: a name, and options that its own keyword parameters declare.

An option is a keyword-only parameter with a default, of type int, float, `tuple[int, ...]` or `Literal[...]`; a `Range`
in `Annotated` bounds it. So a part declares its options where it uses them, and they are checked before any work.
"""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

from kvzip.errors import InputError, UnknownNameError

LIST_MARK = "/"  # between the numbers of an option that takes several: skip_layers=0/1/12


@dataclass(frozen=True)
class Range:
    """What numbers an option may be.  low, high: both allowed; None = no bound.  odd: even numbers are not."""

    low: float | None = None
    high: float | None = None
    odd: bool = False

    def __contains__(self, value: float) -> bool:
        inside = (
            math.isfinite(value)
            and (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
        )
        return inside and not (self.odd and value % 2 == 0)

    def __str__(self) -> str:
        bounds = [f"at least {self.low:g}"] if self.low is not None else []
        bounds += [f"at most {self.high:g}"] if self.high is not None else []
        return ", ".join([*bounds, *(["odd"] if self.odd else [])])


@dataclass(frozen=True)
class Option:
    """One option of a part.  type: int, float, a tuple of numbers, or a Literal."""

    name: str
    type: Any
    range: Range
    default: Any

    @property
    def allowed(self) -> str:
        """What may be given, in words."""
        if typing.get_origin(self.type) is Literal:
            return "one of " + ", ".join(map(str, typing.get_args(self.type)))
        several = typing.get_origin(self.type) is tuple
        kind = f"whole numbers joined by {LIST_MARK}" if several else _NUMBERS[self.type]
        return ", ".join(filter(None, (kind, str(self.range))))

    def read(self, part: str, text: str) -> Any:
        """The value that `text` stands for. Raises InputError."""
        value = self._convert(text.strip())
        values = value if isinstance(value, tuple) else (value,)
        if value is None or any(isinstance(v, int | float) and v not in self.range for v in values):
            example = f"{part}:{self.name}={self.show(self.default) or f'0{LIST_MARK}1'}"
            raise InputError(f"{self.name}={text} of {part} is out of range: give {self.allowed}, as in {example!r}")
        return value

    def show(self, value: Any) -> str:
        """The value as `read` takes it."""
        if isinstance(value, tuple):
            return LIST_MARK.join(map(str, value))
        text = f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
        return text.replace("e+", "e")  # a plus joins parts

    def _convert(self, text: str) -> Any:
        """The value, or None where it is of another type."""
        if typing.get_origin(self.type) is Literal:
            return next((choice for choice in typing.get_args(self.type) if str(choice) == text), None)
        try:
            if typing.get_origin(self.type) is tuple:
                return tuple(sorted({int(number) for number in text.split(LIST_MARK)})) if text else ()
            return self.type(text)
        except ValueError:
            return None


_NUMBERS = {int: "a whole number", float: "a number"}


@dataclass(frozen=True)
class Part:
    """A scorer or a budget with its options.  options: those that differ from their defaults, in declared order."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()
    text: str = field(default="", compare=False)

    def __str__(self) -> str:
        """The canonical form: the name, then the options that differ from their defaults."""
        return self.text or self.name

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function` with these options."""
        return function(*args, **dict(self.options))


def options_of(function: Callable[..., Any]) -> dict[str, Option]:
    """The options that the keyword-only parameters of a function, or of a class's `__init__`, declare."""
    body = function.__init__ if inspect.isclass(function) else function  # type: ignore[misc]
    hints = typing.get_type_hints(body, include_extras=True)
    found = {}
    for name, parameter in inspect.signature(body).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            hint = hints[name]
            marks = [m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Range)]
            kind = getattr(hint, "__origin__", hint) if hasattr(hint, "__metadata__") else hint
            found[name] = Option(name, kind, marks[0] if marks else Range(), parameter.default)
    return found


def make_part(name: str, function: Callable[..., Any], given: dict[str, str]) -> Part:
    """A part from options as text. Raises UnknownNameError and InputError."""
    known = options_of(function)
    for option in given:
        if option not in known:
            raise unknown_option(name, option, known)
    values = {key: option.read(name, given[key]) for key, option in known.items() if key in given}
    chosen = {key: value for key, value in values.items() if value != known[key].default}
    shown = ",".join(f"{key}={known[key].show(value)}" for key, value in chosen.items())
    return Part(name, tuple(chosen.items()), f"{name}:{shown}" if shown else name)


def unknown_option(name: str, option: str, known: typing.Iterable[str]) -> UnknownNameError:
    """The error for an option that a part does not have."""
    names = list(known)
    if not names:
        return UnknownNameError(f"{name} takes no options: leave out {option!r}")
    return UnknownNameError.of(f"option of {name}", option, names)


def named(kind: str, name: str, known: Mapping[str, str]) -> Any:
    """What the lazy string "module:attribute" of that name stands for.  kind: as an error calls it.

    Raises UnknownNameError with the nearest name.
    """
    if name not in known:
        raise UnknownNameError.of(kind, name, known)
    module, attribute = known[name].split(":")
    return getattr(import_module(module), attribute)


def split_part(text: str) -> tuple[str, dict[str, str]]:
    """`window:window_size=64,kernel_size=5` as a name and its options, as text. Raises InputError."""
    name, colon, rest = text.partition(":")
    pairs = [item.partition("=") for item in rest.split(",")] if colon else []
    given = {key.strip(): value for key, _, value in pairs}
    if any(not mark or not key.strip() for key, mark, _ in pairs) or len(given) < len(pairs):
        raise InputError(f"the options in {text!r} can't be read: write name:option=value,option=value, each once")
    return name.strip(), given
