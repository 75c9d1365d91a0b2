"""Ready choices: what is kept, mended and stored in few bits so that a cache is so many times smaller.

Each was chosen by measurement, on questions and on retrieval, at equal bytes: docs/results.md.
"""

from __future__ import annotations

from dataclasses import dataclass

MENDED = "kvzip+floored+refit"  # the base of all of them


@dataclass(frozen=True)
class Recipe:
    """A composition with the keep ratio that it was chosen for.  help: for `kvzip methods`."""

    composition: str
    keep_ratio: float
    help: str


RECIPES = {
    "kvzip:safe": Recipe(f"{MENDED}+int4", 0.8, "four times smaller than 16-bit numbers, hardly any loss"),
    "kvzip:small": Recipe(f"{MENDED}+int4", 0.4, "eight times smaller"),
    "kvzip:tiny": Recipe(f"{MENDED}+int4", 0.25, "twelve times smaller, with a loss that may be felt"),
}
