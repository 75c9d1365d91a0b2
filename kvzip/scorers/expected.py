"""Attention that future queries are expected to pay (Expected Attention, arXiv 2510.00636)."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from kvzip.ops.rope import angles, turn, turn_back
from kvzip.ops.selection import pin_first
from kvzip.parts import Range
from kvzip.scorers.base import BaseScorer, Reading, Shape


class ExpectedScorer(BaseScorer):
    """A pair's score is `(p + epsilon) * |v|`: its expected share of attention, times the norm of its value.

    Queries before rotation are taken as Gaussian, with mean m and covariance C over the context's tokens; both are
    turned by the average rotation of the next `num_future` positions. A key's expected weight is then
    exp(z), z = scale k.m + scale^2 k.C.k / 2; p is the softmax of z over the context, averaged over the query heads of
    a KV head. Queries are turned back from what attention sees, so their norms and scales are the model's own; a soft
    cap is not modelled.  num_sinks: first tokens, prefix included, that are left out of m, C and p, and pinned.
    """

    needs = frozenset({"prefill_queries", "keys"})
    summary = "attention expected of future queries, from the mean and covariance of the text's own"
    source = "Expected Attention, arXiv 2510.00636"

    def __init__(
        self,
        shape: Shape,
        *,
        num_future: Annotated[int, Range(1)] = 512,
        num_sinks: Annotated[int, Range(0)] = 4,
        epsilon: Annotated[float, Range(0)] = 0.0,
    ) -> None:
        super().__init__(shape)
        self.num_future, self.num_sinks, self.epsilon = num_future, num_sinks, epsilon
        self._seen: dict[int, Moments] = {}
        self._prefix_len = 0

    def watch(self, layer: int, reading: Reading) -> None:
        self._prefix_len = reading.prefix_len
        skip = max(0, self.num_sinks - reading.first)
        positions = torch.arange(reading.first, reading.keys.shape[1], device=reading.query.device)
        query = turn_back(reading.query.double(), reading.inv_freq, positions)[:, skip:]
        self._seen.setdefault(layer, Moments(reading)).add(query)

    def read(self, layer: int, keys: Tensor, values: Tensor) -> None:
        first = self._prefix_len + self.shape[2]
        mean, covariance = self._seen[layer].turned(first, self.num_future)
        scale, sinks = self._seen[layer].scale, self._num_sinks_in_context
        keys, values = keys[:, sinks:].float(), values[:, sinks:].float()
        shares = torch.zeros(keys.shape[:2], device=keys.device)
        groups = mean.shape[0] // keys.shape[0]
        for head in range(mean.shape[0]):
            own = keys[head // groups]
            z = own @ mean[head] * scale + (own @ covariance[head] * own).sum(dim=-1) * scale**2 / 2
            shares[head // groups] += torch.softmax(z, dim=-1) / groups
        self._scores[layer, :, sinks:] = ((shares + self.epsilon) * values.norm(dim=-1)).cpu()

    @property
    def _num_sinks_in_context(self) -> int:
        return min(self.shape[2], max(0, self.num_sinks - self._prefix_len))

    def scores(self) -> Tensor:
        return pin_first(self._scores.clone(), self._num_sinks_in_context)


class Moments:
    """Mean and covariance [Hq, D(, D)] of queries before rotation, summed up in float64 block by block."""

    def __init__(self, reading: Reading) -> None:
        num_heads, _, head_dim = reading.query.shape
        self.scale, self.inv_freq, self.count = reading.scale, reading.inv_freq, 0
        self.total = reading.query.new_zeros(num_heads, head_dim, dtype=torch.float64)
        self.products = reading.query.new_zeros(num_heads, head_dim, head_dim, dtype=torch.float64)

    def add(self, query: Tensor) -> None:
        """query: [Hq, T, D] float64."""
        self.count += query.shape[1]
        self.total += query.sum(dim=1)
        self.products += query.transpose(1, 2) @ query

    def turned(self, first: int, length: int) -> tuple[Tensor, Tensor]:
        """Both in float32, turned by the average rotation R of the positions `first` to `first + length - 1`.

        R is linear: the mean is turned as a vector, the covariance C to R C R^T.
        """
        mean = self.total / max(1, self.count)
        covariance = self.products / max(1, self.count) - mean.unsqueeze(2) * mean.unsqueeze(1)
        if self.inv_freq is not None:
            positions = torch.arange(first, first + length, device=mean.device)
            cos, sin = (part.mean(dim=0) for part in angles(self.inv_freq, positions))
            mean = turn(mean, cos, sin)
            covariance = turn(turn(covariance, cos, sin).transpose(1, 2), cos, sin).transpose(1, 2)
        return mean.float(), covariance.float()
