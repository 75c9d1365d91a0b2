"""Least squares over rows that come in blocks and are not kept, and how alike two sets of scores are."""

from __future__ import annotations

import torch
from torch import Tensor

from kvzip.ops.selection import select_global

LEAST_VARIATION = 1e-4  # of an input, relative to its size: what is less may be rounding, as norms of normed keys
LEAST_DEVIATION = 1e-5  # of an input: so weights stay in bounds


class LeastSquares:
    """A linear map from inputs [F] to targets [H], fitted from sums: memory does not grow with the number of rows.

    The sums are float64, on the CPU.
    """

    def __init__(self, num_inputs: int, num_targets: int) -> None:
        self.count = 0
        self._inputs = torch.zeros(num_inputs, dtype=torch.float64)
        self._targets = torch.zeros(num_targets, dtype=torch.float64)
        self._squares = torch.zeros(num_inputs, num_inputs, dtype=torch.float64)
        self._products = torch.zeros(num_inputs, num_targets, dtype=torch.float64)

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """inputs: [n, F].  targets: [n, H]."""
        x, y = inputs.double().cpu(), targets.double().cpu()
        self.count += len(x)
        self._inputs += x.sum(dim=0)
        self._targets += y.sum(dim=0)
        self._squares.addmm_(x.T, x)
        self._products.addmm_(x.T, y)

    def solve(self, penalty: float) -> tuple[Tensor, Tensor]:
        """Weight [F, H] and bias [H], float32, of the least mean square error plus `penalty` times the squared weights.

        The penalty, above 0, counts for inputs of mean 0 and variance 1, and does not touch the bias. An input that
        hardly varies, in itself or relative to its size, has a weight of 0.  At least one row must have been added.
        """
        mean, target = self._inputs / self.count, self._targets / self.count
        covariance = self._squares / self.count - torch.outer(mean, mean)
        variance = covariance.diagonal()
        least = (LEAST_VARIATION**2 * self._squares.diagonal() / self.count).clamp_min(LEAST_DEVIATION**2)
        scale = torch.where(variance > least, torch.maximum(variance, least).rsqrt(), 0.0)
        normal = covariance * torch.outer(scale, scale) + penalty * torch.eye(len(scale), dtype=torch.float64)
        products = (self._products / self.count - torch.outer(mean, target)) * scale.unsqueeze(1)
        weight = torch.linalg.solve(normal, products) * scale.unsqueeze(1)
        return weight.float(), (target - mean @ weight).float()


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's, over all entries of two tensors of one shape, ties in order of the index; in [-1, 1]."""
    ranks = torch.stack([t.flatten().argsort(stable=True).argsort() for t in (first, second)]).double()
    return float(torch.corrcoef(ranks)[0, 1])


def kept_overlap(first: Tensor, second: Tensor, keep_ratio: float) -> float:
    """Of the pairs that one set of scores [Lf, Hkv, S] keeps, all competing, the share that the other keeps too."""
    num_pairs = max(1, round(keep_ratio * first.numel()))
    masks = [select_global(scores, num_pairs) for scores in (first, second)]
    return float((masks[0] & masks[1]).sum() / num_pairs)
