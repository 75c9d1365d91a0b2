"""`keep_ratio="auto"`: the smallest cache whose measured loss stays within a limit, or the best one within some bytes.

One prefill and one replay serve all candidates: each costs its packing, and one pass of both caches over the probe.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from kvzip.budget import Amounts, parse_size
from kvzip.compressed import CompressedContext
from kvzip.errors import BudgetError
from kvzip.options import CompressOptions
from kvzip.recipes import Candidate, candidates

Compress = Callable[[CompressOptions], CompressedContext]
AmountsOf = Callable[[str], Amounts]


class Search:
    """The candidates of one text, the largest first, and what was measured of them.

    compress: makes one, with its certificate.  amounts_of: what budgets of a method are taken of, by its name.
    """

    def __init__(self, options: CompressOptions, compress: Compress, amounts_of: AmountsOf) -> None:
        self.options, self.candidates = options, candidates(options.method)
        self.max_loss = options.max_loss
        self._compress, self._amounts_of = compress, amounts_of
        self.max_nbytes = None
        if options.max_bytes is not None:
            self.max_nbytes = parse_size(options.max_bytes, amounts_of(options.method).full_nbytes, "max_bytes")
        self._bounds: dict[int, float] = {}

    def run(self) -> CompressedContext:
        """The context that was chosen; `info.chosen` says why. Raises BudgetError with the nearest that is possible."""
        if self.max_loss is None:
            return self._within_bytes()
        context, index = self._within_loss(self.max_loss)
        if self.max_nbytes is not None and context.data.kv_nbytes > self.max_nbytes:
            raise self._conflict(context, index, self.max_nbytes)
        return context

    def _within_loss(self, max_loss: float) -> tuple[CompressedContext, int]:
        """The smallest whose bound is within the loss, and its number: by halving, as smaller ones lose more."""
        good, bad, best = -1, len(self.candidates), None
        while bad - good > 1:
            middle = (good + bad) // 2
            context = self._made(middle)
            if self._bounds[middle] <= max_loss:
                good, best = middle, context
            else:
                bad = middle
        if best is None:
            raise BudgetError(
                f"max_loss {max_loss:g} can't be reached: {self.candidates[0]} loses up to {self._bounds[0]:.2g} nats "
                "a token; allow that much"
            )
        why = f"{self.candidates[good]}, the smallest of {len(self.candidates)} with a loss of at most {max_loss:g}"
        if bad < len(self.candidates):
            why += f"; {self.candidates[bad]} would lose up to {self._bounds[bad]:.2g}"
        return _explained(best, why), good

    def _within_bytes(self) -> CompressedContext:
        assert self.max_nbytes is not None
        for index, candidate in enumerate(self.candidates):
            if self._nbytes(candidate) <= self.max_nbytes:
                return self._filled(index)
        last = self.candidates[-1]
        least = self._nbytes(last)
        raise BudgetError(
            f"max_bytes {self.options.max_bytes!r} is too small: {last}, the smallest that is tried, takes {least} "
            f"bytes, {self._amounts_of(last.method).times_text(least)}; allow that much"
        )

    def _filled(self, index: int) -> CompressedContext:
        """The candidate with as many pairs as the bytes allow."""
        candidate = self.candidates[index]
        if candidate.keep_ratio == 1:
            context = self._made(index)
        else:
            context = self._compress(self._plain(None, candidate.method, self._bytes_text))
        kept = f"{candidate.method} at keep ratio {context.data.info.keep_ratio:.2g}"
        return _explained(context, f"{kept}, the best of {len(self.candidates)} within {self._bytes_text}")

    def _made(self, index: int) -> CompressedContext:
        candidate = self.candidates[index]
        context = self._compress(self._plain(candidate.keep_ratio, candidate.method))
        if context.data.info.loss is not None:
            self._bounds[index] = context.data.info.loss["kl_bound"]
        return context

    def _plain(self, keep_ratio: float | None, method: str, budget: str | None = None) -> CompressOptions:
        """What was asked for, with nothing to search."""
        return replace(self.options, keep_ratio=keep_ratio, budget=budget, method=method, max_loss=None, max_bytes=None)

    @property
    def _bytes_text(self) -> str:
        """The bytes that are allowed, as a budget takes them."""
        return self.options.max_bytes if isinstance(self.options.max_bytes, str) else f"{self.max_nbytes}B"

    def _nbytes(self, candidate: Candidate) -> int:
        """Bytes that a candidate takes, at most."""
        amounts = self._amounts_of(candidate.method)
        return math.ceil(amounts.fixed_nbytes + round(candidate.keep_ratio * amounts.num_pairs) * amounts.pair_nbytes)

    def _conflict(self, context: CompressedContext, index: int, max_nbytes: int) -> BudgetError:
        message = (
            f"max_loss {self.max_loss:g} and max_bytes {self.options.max_bytes!r} can't both be: within the loss it "
            f"takes {context.data.kv_nbytes} bytes ({self.candidates[index]})"
        )
        fits = [c for c in self.candidates[index:] if self._nbytes(c) <= max_nbytes]
        if not fits:
            return BudgetError(f"{message}, and none is as small as that; allow more bytes")
        loss = self._within_bytes().data.info.loss
        assert loss is not None  # or nothing could have been measured before
        return BudgetError(f"{message}, within the bytes it loses up to {loss['kl_bound']:.2g} nats a token; allow one")


def _explained(context: CompressedContext, why: str) -> CompressedContext:
    return CompressedContext(context.llm, replace(context.data, info=replace(context.data.info, chosen=why)))
