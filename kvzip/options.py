"""What a compression can be asked for, checked before any work."""

from __future__ import annotations

from dataclasses import dataclass

from kvzip.budget import check_keep_ratio
from kvzip.chunks import CHUNK_LEN
from kvzip.errors import BudgetError, InputError, UnknownNameError
from kvzip.methods import parse_method

DEFAULT_KEEP_RATIO = 0.3
REPLAY_SCOPES = ("auto", "global", "local")
LOCAL_FROM = 10_000  # tokens of a context from which "auto" replays locally: docs/decisions.md says why


@dataclass(frozen=True, kw_only=True)
class CompressOptions:
    """What `compress` takes besides the text.

    keep_ratio: fraction of the context's KV pairs kept in full-attention layers, 0 < r <= 1; 1 = no eviction. Where
    neither it nor `budget` is given: that of a recipe, 1 for a method that evicts nothing, 0.3 otherwise.
    budget: instead, a number of context pairs, or bytes as text ("64MiB").
    method: `kvzip`, a recipe as `kvzip:small`, or parts as `kvzip+uniform` (see `kvzip.methods`). One that decides
    itself how much to keep takes neither of both, and is not `faithful`.
    faithful: the official repository's choices (softmax in the model's dtype, last chunk alone, strict threshold).
    chunk_len: tokens replayed at a time.  replay_scope: what a replayed chunk sees of the context: "global" all of it,
    "local" prefix and chunk alone (the cost is then linear in the length), "auto" local from LOCAL_FROM tokens on.
    certify: measure the loss on the text itself at the end (`kvzip.certificate`), for at most a quarter of the prefill.
    """

    keep_ratio: float | None = None
    budget: int | str | None = None
    method: str = "kvzip"
    faithful: bool = False
    chunk_len: int = CHUNK_LEN
    replay_scope: str = "auto"
    certify: bool = True

    def __post_init__(self) -> None:
        method = parse_method(self.method)
        if method.scorer is None:
            self._check_that_all_stays()
        elif method.decides_count:
            self._check_nothing_is_asked()
        elif self.keep_ratio is None and self.budget is None:
            object.__setattr__(self, "keep_ratio", method.keep_ratio or DEFAULT_KEEP_RATIO)
        if self.keep_ratio is not None:
            check_keep_ratio(self.keep_ratio)
        if isinstance(self.chunk_len, bool) or not isinstance(self.chunk_len, int) or self.chunk_len < 1:
            raise InputError(f"chunk_len {self.chunk_len!r} is out of range: give a whole number of at least 1")
        if self.replay_scope not in REPLAY_SCOPES:
            raise UnknownNameError.of("replay scope", str(self.replay_scope), REPLAY_SCOPES)
        if not isinstance(self.certify, bool):
            raise InputError(f"certify {self.certify!r} is neither True nor False: give one of them")

    def _check_that_all_stays(self) -> None:
        if self.keep_ratio not in (None, 1) or self.budget is not None:
            asked = f"keep_ratio {self.keep_ratio}" if self.budget is None else f"budget {self.budget!r}"
            raise BudgetError(
                f"{asked} can't be reached by method {self.method!r}, which evicts nothing: leave it out, or put a "
                f"scorer first, as in 'kvzip+{self.method}'"
            )
        object.__setattr__(self, "keep_ratio", 1.0)

    def _check_nothing_is_asked(self) -> None:
        asked = {"keep_ratio": self.keep_ratio, "budget": self.budget, "faithful": self.faithful or None}
        for name, value in asked.items():
            if value is not None:
                raise BudgetError(
                    f"{name} {value!r} can't be asked of method {self.method!r}, which decides itself how much to "
                    f"keep: leave it out"
                )

    def replays_locally(self, context_len: int) -> bool:
        """Whether a context of that many tokens is replayed chunk by chunk, each without the others."""
        if self.replay_scope == "auto":
            return not self.faithful and context_len >= LOCAL_FROM
        return self.replay_scope == "local"
