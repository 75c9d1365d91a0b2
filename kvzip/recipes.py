"""Ready choices: what is kept, mended and stored in few bits so that a cache is so many times smaller.

Each was chosen by measurement, on questions and on retrieval, at equal bytes: docs/results.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvzip.budget import Size

MENDED = "reconstruction-plus:power=0.5+floored+refit"  # the base of all of them
MIXED = "group_size=256,channels=mixed,values=rotated,prefix_value_bits=6"  # how codes are made in all of them


def coded(bits: int) -> str:
    """The composition with that many bits a number. Where most pairs go, those that stay are pursued."""
    keys = ":keys=pursued" if bits < 5 else ""
    return f"{MENDED}{keys}+quantize:key_bits={bits},value_bits={bits},{MIXED}"


@dataclass(frozen=True)
class Recipe:
    """A composition with the size that it was chosen for.  help: for `kvzip methods`."""

    composition: str
    size: Size
    help: str


RECIPES = {
    "kvzip:safe": Recipe(coded(5), Size(4, least=0.68), "four times smaller than 16-bit numbers"),
    "kvzip:small": Recipe(coded(4), Size(8, least=0.38), "eight times smaller"),
    "kvzip:tiny": Recipe(coded(3), Size(12, least=0.31), "twelve times smaller, with a loss that is felt"),
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
    *(Candidate(coded(5), ratio) for ratio in (0.85, 0.68)),
    *(Candidate(coded(4), ratio) for ratio in (0.65, 0.5, 0.38)),
    *(Candidate(coded(3), ratio) for ratio in (0.38, 0.31, 0.24, 0.17, 0.1)),
)
RATIOS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05)


def candidates(method: str) -> tuple[Candidate, ...]:
    """What a search may choose from, from the largest to the smallest: for `kvzip` what was best at its bytes, for any
    other method its own keep ratios."""
    return FRONTIER if method == "kvzip" else tuple(Candidate(method, ratio) for ratio in RATIOS)
