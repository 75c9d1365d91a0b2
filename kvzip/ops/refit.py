"""Weights and values with which the pairs that stay stand for a whole block (arXiv 2602.16284, 2605.31105).

Of one KV head and one block of the context, p_i [R] is the attention of R queries to pair i, of all that these saw.
The kept columns A, one a pair that stays and with its key as it is stored, are given weights w and values V'
such that A w is the attention mass of the whole block and A diag(w) V' its outputs. A weight is stored as a bias log w
of the pair's logit. So the block adds to the numerator and to the denominator of any softmax what it added before,
whatever stands beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

MAX_BIAS = 3.0  # weights lie in [exp(-3), exp(3)]: beyond that a fit is of noise
LEAST_WEIGHT = math.exp(-MAX_BIAS)
RIDGES = (0.02, 0.5)  # of the mean diagonal of the normal equations, tried in turn
ENOUGH = 0.5  # of the held-out loss without a fit: where a ridge leaves less, those behind it are not tried
HELD_OUT = 8  # of so many queries one is kept from the fit and judges it
LEAST_ATTENTION = 1e-30  # sum of squares of the kept columns; below it least squares have nothing to go by
MAX_STEPS = 30  # of projected gradients, where a bound is reached


Rounding: TypeAlias = Callable[[Tensor], Tensor]  # values [n, D] -> as they are read back


@dataclass(frozen=True)
class Fit:
    """weights: [n], at least exp(-MAX_BIAS), at most exp(MAX_BIAS).  values: [n, D]."""

    weights: Tensor
    values: Tensor


@dataclass(frozen=True)
class Block:
    """What R queries take of one block, and what they take beside it, all in one unit of mass for each query.

    kept: [R, n], attention to the pairs that stay, by the keys that are stored.  took: [R, D + 1], what attention to
    the whole block put out before, and as the last column its mass.  beside: [R, D + 1], the same of all that is
    beside the block.  float32.
    """

    kept: Tensor
    took: Tensor
    beside: Tensor

    def part(self, rows: slice | Tensor) -> Block:
        """That of some of the queries."""
        return Block(self.kept[rows], self.took[rows], self.beside[rows])

    def loss(self, fit: Fit) -> float:
        """Mean squared error of what attention puts out, over all that is seen, with the block as fitted."""
        found = self.beside + self.kept @ (with_mass(fit.values) * fit.weights.unsqueeze(1))
        return float((_per_mass(found) - self.outputs).square().sum(dim=1).mean())

    @cached_property
    def outputs(self) -> Tensor:
        """What attention put out before, over all that is seen: [R, D]."""
        return _per_mass(self.beside + self.took)


def with_mass(values: Tensor) -> Tensor:
    """Values [..., D] with a last column of ones, so that what attention puts out has its mass there."""
    return torch.nn.functional.pad(values, (0, 1), value=1.0)


def _per_mass(outputs: Tensor) -> Tensor:
    """[R, D + 1] as normalised outputs [R, D]."""
    return outputs[:, :-1] / outputs[:, -1:]


@dataclass(frozen=True)
class Moments:
    """What least squares need of some queries: sums over them.

    gram: [n, n], of the kept columns A with themselves.  took: [n, D + 1], of A with the outputs of the block and, as
    the last column, with its mass.
    """

    gram: Tensor
    took: Tensor

    @classmethod
    def of(cls, block: Block) -> Moments:
        return cls(block.kept.T @ block.kept, block.kept.T @ block.took)

    def part(self, columns: Tensor) -> Moments:
        """Those of some of the pairs, [n] bool."""
        return Moments(self.gram[columns][:, columns], self.took[columns])

    @property
    def is_seen(self) -> bool:
        """Whether any query looks at these pairs."""
        return float(self.gram.trace()) > LEAST_ATTENTION

    def fit(self, values: Tensor, ridge: float) -> Fit:
        """Weights and values that make mass and outputs fit best, near 1 and near the pairs' own values [n, D]."""
        weights = self.fit_weights(ridge)
        return Fit(weights, self.fit_values(weights, values, ridge))

    def fit_weights(self, ridge: float) -> Tensor:
        """The weights [n] that make the mass fit best, |A w - m|^2 + ridge * d * |w - 1|^2, within their bounds.

        d: the mean diagonal of the Gram matrix.  Solved exactly where no bound is reached, by accelerated projected
        gradients from there otherwise.
        """
        system, pull = _with_ridge(self.gram, ridge)
        target = self.took[:, -1] + pull
        weights = _solve(system, target.unsqueeze(1)).squeeze(1)
        if bool(((weights >= LEAST_WEIGHT) & (weights <= 1 / LEAST_WEIGHT)).all()):
            return weights
        return _within_bounds(system, target, weights)

    def fit_values(self, weights: Tensor, values: Tensor, ridge: float) -> Tensor:
        """The values V' [n, D] with which the weighted pairs put out what the block did, near their own values [n, D].

        |B V' - T|^2 + ridge * d * |V' - V|^2, where B = A diag(w) are the weighted columns, T the outputs of the block
        and d the mean diagonal of B'B.
        """
        gram = self.gram * weights * weights.unsqueeze(1)
        return values + _solve(_with_ridge(gram, ridge)[0], self.took[:, :-1] * weights.unsqueeze(1) - gram @ values)


def _with_ridge(gram: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """The Gram matrix with a ridge of that share of its mean diagonal, and the ridge."""
    system, pull = gram.clone(), ridge * gram.diagonal().mean()
    system.diagonal().add_(pull)
    return system, pull


def _solve(system: Tensor, targets: Tensor) -> Tensor:
    """Of a positive definite system [n, n] and targets [n, k].

    By an upper factor, which several threads find in half the time that a lower one takes them.
    """
    return torch.cholesky_solve(targets, torch.linalg.cholesky(system, upper=True), upper=True)


def _within_bounds(system: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """The solution of a system [n, n] within the bounds, by accelerated projected gradients from `weights` on."""
    step = 1 / system.abs().sum(dim=1).max()  # no eigenvalue is larger
    weights = ahead = weights.clamp(LEAST_WEIGHT, 1 / LEAST_WEIGHT)
    for number in range(MAX_STEPS):
        slope = torch.addmv(target, system, ahead, beta=-1)
        new = torch.addcmul(ahead, step, slope, value=-1).clamp_(LEAST_WEIGHT, 1 / LEAST_WEIGHT)
        ahead, weights = torch.lerp(weights, new, 1 + number / (number + 3)), new
    return weights


def refit(fitted: Block, judge: Block, values: Tensor, read_back: Rounding | None = None) -> Fit | None:
    """Weights and values of the kept pairs of one block, or None where the held-out queries are better off without, or
    no query looks at these pairs.

    fitted, judge: the block as most queries see it, and as the held-out ones do; these choose the ridge among `RIDGES`,
    by values as they will be read back from where they are stored.
    values: [n, D] float32, the pairs' own.
    """
    moments = Moments.of(fitted)
    if not moments.is_seen:
        return None

    def loss(fit: Fit) -> float:
        return judge.loss(fit if read_back is None else Fit(fit.weights, read_back(fit.values)))

    plain = loss(Fit(torch.ones(len(values), device=values.device), values))
    best, least = None, plain
    for ridge in RIDGES:
        fit = moments.fit(values, ridge)
        left = loss(fit)
        if left < least:
            best, least = fit, left
        if least < ENOUGH * plain:
            break
    return best
