"""matplotlib, set up the same way for every picture."""

from __future__ import annotations

from typing import Any

from kvzip.errors import MissingExtraError


def pyplot() -> Any:
    """`matplotlib.pyplot` without a window; the same numbers give the same bytes. Raises MissingExtraError."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtraError.of("matplotlib", "plots") from error
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "kvzip"
    import matplotlib.pyplot as plt

    return plt
