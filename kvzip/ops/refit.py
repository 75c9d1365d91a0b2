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
from typing import TypeAlias

import torch
from torch import Tensor

MAX_BIAS = 3.0  # weights lie in [exp(-3), exp(3)]: beyond that a fit is of noise
LEAST_WEIGHT = math.exp(-MAX_BIAS)
RIDGES = (0.01, 0.1, 1.0)  # of the mean diagonal of the normal equations, tried in turn
HELD_OUT = 4  # of so many queries one is kept from the fit and judges it
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

    kept: [R, n], attention to the pairs that stay, by the keys that are stored.  mass: [R], attention to the whole
    block before.  outputs: [R, D], what that took.  outside: [R] and rest: [R, D], the same of all that is beside it.
    float32.
    """

    kept: Tensor
    mass: Tensor
    outputs: Tensor
    outside: Tensor
    rest: Tensor

    def part(self, chosen: Tensor) -> Block:
        """chosen: [R] bool."""
        fields = (self.kept, self.mass, self.outputs, self.outside, self.rest)
        return Block(*(field[chosen] for field in fields))

    def loss(self, fit: Fit) -> float:
        """Mean squared error of what attention puts out, over all that is seen, with the block as fitted."""
        found = self.rest + self.kept @ (fit.weights.unsqueeze(1) * fit.values)
        found = found / (self.outside + self.kept @ fit.weights).unsqueeze(1)
        wanted = (self.rest + self.outputs) / (self.outside + self.mass).unsqueeze(1)
        return float((found - wanted).square().sum(dim=1).mean())


@dataclass(frozen=True)
class Moments:
    """What least squares need of some queries: sums over them, so those of several blocks of queries add up.

    gram: [n, n], of the kept columns A with themselves.  mass: [n], of A with the mass of the block.  outputs: [n, D],
    of A with its outputs.
    """

    gram: Tensor
    mass: Tensor
    outputs: Tensor

    @classmethod
    def of(cls, block: Block) -> Moments:
        kept = block.kept
        return cls(kept.T @ kept, kept.T @ block.mass, kept.T @ block.outputs)

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.gram + other.gram, self.mass + other.mass, self.outputs + other.outputs)

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
        target = self.mass + pull
        weights = torch.cholesky_solve(target.unsqueeze(1), torch.linalg.cholesky(system)).squeeze(1)
        if bool(((weights >= LEAST_WEIGHT) & (weights <= 1 / LEAST_WEIGHT)).all()):
            return weights
        return _within_bounds(system, target, weights)

    def fit_values(self, weights: Tensor, values: Tensor, ridge: float) -> Tensor:
        """The values V' [n, D] with which the weighted pairs put out what the block did, near their own values [n, D].

        |B V' - T|^2 + ridge * d * |V' - V|^2, where B = A diag(w) are the weighted columns, T the outputs of the block
        and d the mean diagonal of B'B.
        """
        gram = self.gram * weights * weights.unsqueeze(1)
        factor = torch.linalg.cholesky(_with_ridge(gram, ridge)[0])
        return values + torch.cholesky_solve(self.outputs * weights.unsqueeze(1) - gram @ values, factor)


def _with_ridge(gram: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """The Gram matrix with a ridge of that share of its mean diagonal, and the ridge."""
    pull = ridge * gram.diagonal().mean()
    return gram + torch.diag(pull.expand(len(gram))), pull


def _within_bounds(system: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """The solution of a system [n, n] within the bounds, by accelerated projected gradients from `weights` on."""
    step = 1 / system.abs().sum(dim=1).max()  # no eigenvalue is larger
    weights = ahead = weights.clamp(LEAST_WEIGHT, 1 / LEAST_WEIGHT)
    for number in range(MAX_STEPS):
        new = (ahead - step * (system @ ahead - target)).clamp(LEAST_WEIGHT, 1 / LEAST_WEIGHT)
        ahead = new + number / (number + 3) * (new - weights)
        weights = new
    return weights


def refit(block: Block, values: Tensor, is_held_out: Tensor, read_back: Rounding | None = None) -> Fit | None:
    """Weights and values of the kept pairs of one block, or None where the held-out queries are better off without, or
    no query looks at these pairs.

    values: [n, D] float32, the pairs' own.  is_held_out: [R] bool; these choose the ridge among `RIDGES`, by values as
    they will be read back from where they are stored. The fit itself is then made of all queries.
    """
    seen, judge = block.part(~is_held_out), block.part(is_held_out)
    if not float(seen.kept.square().sum()) > LEAST_ATTENTION:
        return None

    def loss(fit: Fit) -> float:
        return judge.loss(fit if read_back is None else Fit(fit.weights, read_back(fit.values)))

    moments = Moments.of(seen)
    plain = loss(Fit(torch.ones(len(values), device=values.device), values))
    losses = [loss(moments.fit(values, ridge)) for ridge in RIDGES]
    best = min(range(len(RIDGES)), key=lambda i: losses[i])
    if not losses[best] < plain:
        return None
    return (moments + Moments.of(judge)).fit(values, RIDGES[best])
