"""Fitting the surrogate of `kvzip-fast`: from what enters each layer's attention to the scores a replay gives.

    texts ─► contexts of two lengths ─► replay: true scores ─► read again: inputs ─► least squares

A held-out fifth of the contexts is foretold before it joins the fit; that is what is reported.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvzip.chunks import CHUNK_LEN
from kvzip.compress import Engine, FullContext
from kvzip.errors import InputError
from kvzip.ops.regression import LeastSquares, kept_overlap, rank_correlation
from kvzip.progress import Progress, silent
from kvzip.scorers.base import Observer, Profile, Reading
from kvzip.scorers.distilled import features, places
from kvzip.surrogates import save_surrogate

CONTEXT_LEN = CHUNK_LEN  # tokens of a long context, at most: a replay repeats so many at a time
SHORTER = 3  # so many times shorter is every second context: scores of short texts differ
MIN_LEN = 200  # tokens of all texts together
KEEP_RATIOS = (0.5, 0.3)  # at which kept pairs are compared
HELD_OUT = 5  # one of so many contexts
PENALTY = 0.03  # of the squared weights; between 0.001 and 0.1 nothing changes: docs/log.md
LEAST_SCORE = 1e-6  # below it, scores are not told apart


@dataclass(frozen=True)
class Agreement:
    """Foretold scores beside true ones.  rank_correlation: Spearman's, over all layers, heads and tokens.

    overlap: by keep ratio, the share of the pairs kept by true scores that foretold ones keep too.
    """

    rank_correlation: float
    overlap: dict[float, float]


@dataclass(frozen=True)
class Distillation:
    """What `llm.distill` did.  path: the file written.  num_tokens: of all contexts, of which `num_held_out` were
    foretold before they joined the fit: `held_out` is the mean over their contexts.  seconds: in all.
    """

    path: Path
    num_tokens: int
    num_held_out: int
    held_out: Agreement
    seconds: float


def split_contexts(context_ids: Tensor) -> list[Tensor]:
    """Ids [S] as at least two contexts, in turn long ones of CONTEXT_LEN tokens at most and short ones of a third."""
    groups = context_ids.tensor_split(math.ceil(context_ids.numel() / (CONTEXT_LEN + CONTEXT_LEN // SHORTER)))
    return [part for group in groups for part in group.tensor_split([-max(1, len(group) // (SHORTER + 1))])]


def agreement(truth: Tensor, foretold: Tensor) -> Agreement:
    """Of two sets of scores [Lf, Hkv, S] of one context."""
    overlap = {ratio: kept_overlap(truth, foretold, ratio) for ratio in KEEP_RATIOS}
    return Agreement(rank_correlation(truth, foretold), overlap)


class Distiller:
    """Reads contexts one after another, and ends in a profile."""

    def __init__(self, engine: Engine, prefix_ids: Tensor) -> None:
        self.engine, self.prefix_ids = engine, prefix_ids
        self._sums: dict[int, LeastSquares] = {}

    def add(self, context_ids: Tensor, compare_with: Profile | None = None, progress: Progress = silent) -> Agreement:
        """Let the fit know one context [S].  compare_with: a profile whose scores are compared with the true ones.

        Raises ContextLengthError where it does not fit the positions of the model.
        """
        full = FullContext(self.engine, self.prefix_ids, context_ids)
        chunk_len = full.fit_chunk_len()
        full.prefill(progress=_third(progress, 0))
        truth = full.score("reconstruction", chunk_len, progress=_third(progress, 1))
        foretold = truth if compare_with is None else full.score("distilled", profile=compare_with)
        full.read_again(_Collector(truth, self._sums), progress=_third(progress, 2))
        return agreement(truth, foretold)

    def profile(self) -> Profile:
        """Weight [Lf, F, Hkv] and bias [Lf, Hkv], float32, of what was added so far."""
        fits = [self._sums[layer].solve(PENALTY) for layer in sorted(self._sums)]
        return {"weight": torch.stack([w for w, _ in fits]), "bias": torch.stack([b for _, b in fits])}


class _Collector(Observer):
    """Adds the tokens of one context, whose true scores [Lf, Hkv, S] are known, to the sums of each layer."""

    needs = frozenset({"attention_inputs"})

    def __init__(self, scores: Tensor, sums: dict[int, LeastSquares]) -> None:
        num_layers, num_kv_heads, context_len = scores.shape
        super().__init__((num_layers, num_kv_heads, context_len))
        self._targets, self._sums = scores.clamp_min(LEAST_SCORE).log(), sums
        self._places = places(context_len)

    def watch(self, layer: int, reading: Reading) -> None:
        rows, first = features(reading, self._places), reading.first - reading.prefix_len
        if layer not in self._sums:
            self._sums[layer] = LeastSquares(rows.shape[1], self.shape[1])
        self._sums[layer].add(rows, self._targets[layer, :, first : first + len(rows)].T)


def fit_surrogate(
    engine: Engine, prefix_ids: Tensor, context_ids: Tensor, *, seed: int = 0, progress: Progress = silent
) -> tuple[Profile, Agreement, int]:
    """The profile that the `distilled` scorer needs, from ids [S] of all texts.

    Beside it, how well contexts were foretold before they joined the fit (the mean over them), and how many tokens
    these have.  seed: which contexts that are; the profile is fitted to all.
    Raises InputError for too few tokens, ContextLengthError as `Distiller.add`.
    """
    total = context_ids.numel()
    if total < MIN_LEN:
        raise InputError(f"the texts have {total} tokens, too few to distill: give at least {MIN_LEN}, best 10,000")
    contexts = split_contexts(context_ids)
    order = torch.randperm(len(contexts), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = [contexts[index] for index in order[: max(1, len(contexts) // HELD_OUT)]]
    fitted = [contexts[index] for index in order[len(held_out) :]]
    distiller, done = Distiller(engine, prefix_ids), 0

    def report(_: str, part: float, of: float | None) -> None:
        progress("distill", done + context.numel() * part / (of or 1), total)

    for context in fitted:
        distiller.add(context, progress=report)
        done += context.numel()
    known, found = distiller.profile(), []
    for context in held_out:
        found.append(distiller.add(context, known, progress=report))
        done += context.numel()
    return distiller.profile(), _mean(found), sum(context.numel() for context in held_out)


def distill(
    engine: Engine,
    fingerprint: str,
    prefix_ids: Tensor,
    context_ids: Tensor,
    *,
    source: str = "",
    seed: int = 0,
    progress: Progress = silent,
) -> Distillation:
    """Fit the surrogate of a model and keep it in the cache folder.  Arguments, errors: `fit_surrogate`, FileError."""
    started = time.perf_counter()
    profile, held_out, num_held_out = fit_surrogate(engine, prefix_ids, context_ids, seed=seed, progress=progress)
    path = save_surrogate(fingerprint, profile, source)
    return Distillation(path, context_ids.numel(), num_held_out, held_out, time.perf_counter() - started)


def _mean(found: Sequence[Agreement]) -> Agreement:
    overlap = {ratio: sum(a.overlap[ratio] for a in found) / len(found) for ratio in KEEP_RATIOS}
    return Agreement(sum(a.rank_correlation for a in found) / len(found), overlap)


def _third(progress: Progress, number: int) -> Progress:
    """The progress of one of the three passes over a context, as a part of them all."""
    return lambda _, done, of: progress("distill", number + done / of if of else number + 1, 3)
