"""Weights and values with which the pairs that stay stand for those that are gone (arXiv 2602.16284, 2605.31105).

Of one KV head and one block of the context, p_i [R] is the attention of R queries to pair i, over all that the head
ever held. The kept columns A = [p_j, j kept] are given weights w and values V' such that A w is the attention mass of
the whole block and (A w) V' its outputs. A weight is stored as a bias log w of the pair's logit. So the block adds to
the numerator and to the denominator of any softmax what it added before, whatever stands beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_BIAS = 3.0  # weights lie in [exp(-3), exp(3)]: beyond that a fit is of noise
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0)  # of the mean diagonal of the normal equations, tried in turn
HELD_OUT = 4  # of so many queries one is kept from the fit and judges it
LEAST_ATTENTION = 1e-30  # sum of squares of the kept columns; below it least squares have nothing to go by
MAX_STEPS = 30  # of projected gradients, where a bound is reached


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
    def of(cls, kept: Tensor, mass: Tensor, outputs: Tensor) -> Moments:
        """kept: [R, n].  mass: [R].  outputs: [R, D]."""
        return cls(kept.T @ kept, kept.T @ mass, kept.T @ outputs)

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.gram + other.gram, self.mass + other.mass, self.outputs + other.outputs)


@dataclass(frozen=True)
class Fit:
    """weights: [n], at least exp(-MAX_BIAS), at most exp(MAX_BIAS).  values: [n, D]."""

    weights: Tensor
    values: Tensor


def fit_weights(moments: Moments, ridge: float) -> Tensor:
    """The weights [n] that make the mass fit best, |A w - m|^2 + ridge * d * |w - 1|^2, within their bounds.

    d: the mean diagonal of the Gram matrix.  Solved exactly where no bound is reached, by accelerated projected
    gradients from there otherwise.
    """
    pull = ridge * moments.gram.diagonal().mean()
    system = moments.gram + torch.diag(pull.expand(len(moments.mass)))
    target = moments.mass + pull
    low, high = torch.e**-MAX_BIAS, torch.e**MAX_BIAS
    weights = torch.cholesky_solve(target.unsqueeze(1), torch.linalg.cholesky(system)).squeeze(1)
    if bool(((weights >= low) & (weights <= high)).all()):
        return weights
    step = 1 / system.abs().sum(dim=1).max()  # no eigenvalue is larger
    weights = ahead = weights.clamp(low, high)
    for number in range(MAX_STEPS):
        new = (ahead - step * (system @ ahead - target)).clamp(low, high)
        ahead = new + number / (number + 3) * (new - weights)
        weights = new
    return weights


def fit_values(moments: Moments, weights: Tensor, values: Tensor, ridge: float) -> Tensor:
    """The values V' [n, D] with which the weighted pairs put out what the block did, near their own values [n, D].

    |B V' - T|^2 + ridge * d * |V' - V|^2, where B = A w are the weighted columns, T the outputs of the block and d the
    mean diagonal of B'B.
    """
    gram = moments.gram * weights * weights.unsqueeze(1)
    pull = ridge * gram.diagonal().mean()
    factor = torch.linalg.cholesky(gram + torch.diag(pull.expand(len(weights))))
    return values + torch.cholesky_solve(moments.outputs * weights.unsqueeze(1) - gram @ values, factor)


def refit(attention: Tensor, values: Tensor, keep_mask: Tensor, rest: Tensor, is_held_out: Tensor) -> Fit | None:
    """Weights and values of the kept pairs of one block, or None where the held-out queries are better off without, or
    no query looks at these pairs.

    attention: [R, S] float32, of each query to each pair of the block.  values: [S, D] float32.  keep_mask: [S] bool.
    rest: [R, D], what each query takes from outside of the block: its outputs are attention @ values + rest.
    is_held_out: [R] bool; these choose the ridge among `RIDGES`. The fit itself is then made of all queries.
    """
    kept, own = attention[:, keep_mask], values[keep_mask]
    mass, outputs = attention.sum(dim=1), attention @ values
    if not float(kept[~is_held_out].square().sum()) > LEAST_ATTENTION:
        return None
    judge = Judge(kept[is_held_out], mass[is_held_out], outputs[is_held_out], rest[is_held_out])
    seen = Moments.of(kept[~is_held_out], mass[~is_held_out], outputs[~is_held_out])
    losses = [judge.loss(Fit(torch.ones(len(own)), own))]
    for ridge in RIDGES:
        losses.append(judge.loss(_fit(seen, own, ridge)))
    best = min(range(len(losses)), key=lambda i: losses[i])
    if best == 0 or not losses[0] > 0:
        return None
    held_out = Moments.of(judge.kept, judge.mass, judge.outputs)
    return _fit(seen + held_out, own, RIDGES[best - 1])


def _fit(moments: Moments, values: Tensor, ridge: float) -> Fit:
    weights = fit_weights(moments, ridge)
    return Fit(weights, fit_values(moments, weights, values, ridge))


@dataclass(frozen=True)
class Judge:
    """Queries that had no part in a fit.  kept [R, n], mass [R], outputs [R, D], rest [R, D]: as in `refit`."""

    kept: Tensor
    mass: Tensor
    outputs: Tensor
    rest: Tensor

    def loss(self, fit: Fit) -> float:
        """Mean squared error of what attention puts out, over the whole cache, with the block as fitted."""
        weighted = self.kept * fit.weights
        total = 1 - self.mass + weighted.sum(dim=1)
        found = (self.rest + weighted @ fit.values) / total.unsqueeze(1)
        return float((found - self.rest - self.outputs).square().sum(dim=1).mean())
