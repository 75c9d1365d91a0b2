"""Ready choices: what is kept, mended and stored in few bits so that a cache is so many times smaller.

Each was chosen by measurement, on questions and on retrieval, at equal bytes: docs/results.md.
"""

from __future__ import annotations

from dataclasses import dataclass

MENDED = "reconstruction-plus:power=0.5+floored+refit"  # the base of all of them
PURSUED = f"{MENDED}:keys=pursued+int4:group_size=128,value_axis=channel"  # in four bits, half the scales of `int4`


@dataclass(frozen=True)
class Recipe:
    """A composition with the keep ratio that it was chosen for.  help: for `kvzip methods`."""

    composition: str
    keep_ratio: float
    help: str


RECIPES = {
    "kvzip:safe": Recipe(f"{MENDED}+k8v4", 0.56, "four times smaller than 16-bit numbers"),
    "kvzip:small": Recipe(PURSUED, 0.4, "eight times smaller"),
    "kvzip:tiny": Recipe(PURSUED, 0.27, "twelve times smaller, with a loss that is felt"),
}


@dataclass(frozen=True)
class Candidate:
    """One thing that a search may choose."""

    method: str
    keep_ratio: float

    def __str__(self) -> str:
        return f"{self.method} at keep ratio {self.keep_ratio:g}"


FRONTIER = (
    Candidate("kvzip", 1.0),
    Candidate("kvzip+k8v4", 1.0),
    *(Candidate(f"{MENDED}+k8v4", ratio) for ratio in (0.8, 0.56)),
    *(Candidate(PURSUED, ratio) for ratio in (0.65, 0.5, 0.4, 0.32, 0.27, 0.2, 0.15, 0.1)),
)
RATIOS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05)


def candidates(method: str) -> tuple[Candidate, ...]:
    """What a search may choose from, from the largest to the smallest: for `kvzip` what was best at its bytes, for any
    other method its own keep ratios."""
    return FRONTIER if method == "kvzip" else tuple(Candidate(method, ratio) for ratio in RATIOS)
