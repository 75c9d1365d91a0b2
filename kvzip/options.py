"""What a compression can be asked for, checked before any work."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvzip.budget import Amounts, Size, check_keep_ratio, parse_size, resolve_pairs
from kvzip.chunks import CHUNK_LEN
from kvzip.errors import BudgetError, InputError, UnknownNameError
from kvzip.methods import Method, parse_method

DEFAULT_KEEP_RATIO = 0.3
AUTO = "auto"
DEFAULT_MAX_LOSS = 0.05  # nats a token, where "auto" is asked for and nothing else
REPLAY_SCOPES = ("auto", "global", "local")
LOCAL_FROM = 10_000  # tokens of a context from which "auto" replays locally: docs/decisions.md says why


@dataclass(frozen=True, kw_only=True)
class CompressOptions:
    """What `compress` takes besides the text.

    keep_ratio: fraction of the context's KV pairs kept in full-attention layers, 0 < r <= 1; 1 = no eviction. Where
    neither it nor `budget` is given: a recipe has its own size, a method that evicts nothing 1, others 0.3.
    budget: instead, a number of context pairs, or as text the bytes of the compressed cache ("64MiB"), or how many
    times smaller it is to be than a full one of 16-bit numbers ("8x").
    keep_ratio="auto": instead, what is kept and how is searched for (`kvzip.auto`), so that the certificate stays
    within `max_loss` (0.05 nats a token by default), or that the cache stays within `max_bytes` ("64MiB", "8x", a
    number), or both. Either of these asks for "auto" by itself. With `kvzip` the search goes over the recipes and what
    lies between them, with another method over its keep ratios.
    method: `kvzip`, a recipe as `kvzip:small`, or parts as `kvzip+uniform` (see `kvzip.methods`). One that decides
    itself how much to keep takes neither of both, and is not `faithful`.
    faithful: the official repository's choices (softmax in the model's dtype, last chunk alone, strict threshold).
    chunk_len: tokens replayed at a time.  replay_scope: what a replayed chunk sees of the context: "global" all of it,
    "local" prefix and chunk alone (the cost is then linear in the length), "auto" local from LOCAL_FROM tokens on.
    certify: measure the loss on the text itself at the end (`kvzip.certificate`), for at most a quarter of the prefill.
    """

    keep_ratio: float | str | None = None
    budget: int | str | None = None
    method: str = "kvzip"
    faithful: bool = False
    chunk_len: int = CHUNK_LEN
    replay_scope: str = "auto"
    certify: bool = True
    max_loss: float | None = None
    max_bytes: int | str | None = None

    def __post_init__(self) -> None:
        method = parse_method(self.method)
        if self.keep_ratio == AUTO or self.max_loss is not None or self.max_bytes is not None:
            self._check_search(method)
        elif method.scorer is None:
            self._check_that_all_stays()
        elif method.decides_count:
            self._check_nothing_is_asked()
        elif self.keep_ratio is None and self.budget is None and method.size is None:
            object.__setattr__(self, "keep_ratio", DEFAULT_KEEP_RATIO)
        if self.keep_ratio is not None and not self.is_auto:
            check_keep_ratio(self.keep_ratio)
        if isinstance(self.budget, str):
            parse_size(self.budget, 1)  # how large the cache is matters to nothing that is refused
        if isinstance(self.chunk_len, bool) or not isinstance(self.chunk_len, int) or self.chunk_len < 1:
            raise InputError(f"chunk_len {self.chunk_len!r} is out of range: give a whole number of at least 1")
        if self.replay_scope not in REPLAY_SCOPES:
            raise UnknownNameError.of("replay scope", str(self.replay_scope), REPLAY_SCOPES)
        if not isinstance(self.certify, bool):
            raise InputError(f"certify {self.certify!r} is neither True nor False: give one of them")

    @property
    def is_auto(self) -> bool:
        """Whether what is kept is to be searched for."""
        return self.keep_ratio == AUTO

    @property
    def ratio(self) -> float | None:
        """The keep ratio as a number; None where a budget or a search decides."""
        return None if self.keep_ratio is None or self.is_auto else check_keep_ratio(self.keep_ratio)

    @property
    def size(self) -> Size | None:
        """That of a recipe, where nothing else is asked for."""
        return parse_method(self.method).size if self.keep_ratio is None and self.budget is None else None

    @property
    def budget_text(self) -> str | None:
        """What was asked for instead of a keep ratio, "64MiB" or "8x", or what the recipe goes by."""
        asked = self.size if self.budget is None else self.budget
        return None if asked is None else str(asked)

    def num_pairs(self, amounts: Amounts) -> int:
        """How many context pairs to keep. Raises BudgetError."""
        size = self.size
        return resolve_pairs(self.ratio, self.budget, amounts) if size is None else size.num_pairs(amounts)

    def _check_search(self, method: Method) -> None:
        limits = "max_loss" if self.max_loss is not None else "max_bytes" if self.max_bytes is not None else "'auto'"
        for name, value in (("keep_ratio", self.keep_ratio), ("budget", self.budget)):
            if value is not None and value != AUTO:
                raise BudgetError(
                    f"{name} {value!r} can't be asked beside {limits}, which has it searched for: leave one out"
                )
        if method.scorer is None or method.decides_count or method.shares_layers:
            lacks = "full cache to be measured against" if method.shares_layers else "keep ratio to search for"
            raise BudgetError(
                f"{limits} can't be asked of method {self.method!r}, which has no {lacks}: take another method"
            )
        if not self.certify:
            raise InputError(f"certify False can't be asked beside {limits}: the search goes by the certificate")
        if self.faithful:
            raise InputError(f"faithful can't be asked beside {limits}: what is searched has no such form")
        if self.max_loss is not None:
            _check_loss(self.max_loss)
        if self.max_bytes is not None:
            parse_size(self.max_bytes, 1, "max_bytes")  # as above
        elif self.max_loss is None:
            object.__setattr__(self, "max_loss", DEFAULT_MAX_LOSS)
        object.__setattr__(self, "keep_ratio", AUTO)

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


def _check_loss(loss: float) -> None:
    if isinstance(loss, bool) or not isinstance(loss, int | float) or not 0 < loss < math.inf:
        raise BudgetError(f"max_loss {loss!r} is out of range: give nats a token above 0, as 0.05")
