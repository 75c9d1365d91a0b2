"""How long steps report themselves: a callable that the caller may give; the library stays silent without one."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float, "float | None"], None]
"""(phase, done, total or None): called as a phase advances; `done == total` ends it. Units: tokens or bytes."""


def silent(phase: str, done: float, total: float | None) -> None:
    """The progress that reports nothing."""
