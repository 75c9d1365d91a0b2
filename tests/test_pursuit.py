"""Columns chosen by pursuit: against trying every column at every step, and in cases that can be worked out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvzip.ops.pursuit import RIDGE, principal, pursue


def case(seed: int, num_columns: int = 9, num_targets: int = 3) -> tuple[Tensor, Tensor]:
    """Columns [R, m] as attention has them, and targets [R, r] that are sums of all."""
    gen = torch.Generator().manual_seed(seed)
    columns = torch.softmax(2 * torch.randn(40, num_columns, generator=gen), dim=1)
    return columns, columns @ torch.randn(num_columns, num_targets, generator=gen)


def explained(columns: Tensor, targets: Tensor, chosen: list[int], pull: float) -> float:
    """By how much |A_S U - T|^2 + pull |U|^2 is less than |T|^2, for the best U, in float64."""
    own, wanted = columns[:, chosen].double(), targets.double()
    system = own.T @ own + pull * torch.eye(len(chosen), dtype=torch.float64)
    return float((own.T @ wanted * torch.linalg.solve(system, own.T @ wanted)).sum())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8))
def test_each_step_takes_the_column_that_leaves_least(seed: int, count: int) -> None:
    columns, targets = case(seed)
    gram = columns.T @ columns
    pull, chosen = RIDGE * float(gram.diagonal().mean()), list[int]()
    for step in range(1, count + 1):
        (found,) = pursue(gram[None], (columns.T @ targets)[None], [step])
        (new,) = set(found.nonzero().squeeze(1).tolist()) - set(chosen)
        gains = {j: explained(columns, targets, [*chosen, j], pull) for j in range(9) if j not in chosen}
        assert gains[new] >= max(gains.values()) - 1e-4 * abs(max(gains.values()))
        chosen.append(new)


def test_systems_of_several_sizes_are_as_each_alone() -> None:
    alone, padded = [], []
    for seed, num_columns in ((0, 9), (1, 6), (2, 4)):
        columns, targets = case(seed, num_columns)
        alone.append((columns.T @ columns, columns.T @ targets))
        missing = 9 - num_columns
        gram = torch.nn.functional.pad(alone[-1][0], (0, missing, 0, missing))
        padded.append((gram, torch.nn.functional.pad(alone[-1][1], (0, 0, 0, missing))))
    counts = [3, 6, 1]
    found = pursue(*map(torch.stack, zip(*padded, strict=True)), counts)
    assert found.sum(1).tolist() == counts
    for (gram, took), count, taken in zip(alone, counts, found, strict=True):
        (expected,) = pursue(gram[None], took[None], [count])
        assert torch.equal(taken[: len(expected)], expected) and not taken[len(expected) :].any()


def test_equal_columns_are_taken_once() -> None:
    """One of them stands for all; the others add nothing."""
    columns, _ = case(3)
    columns[:, 4:] = columns[:, 3:4]
    (found,) = pursue((columns.T @ columns)[None], (columns.T @ columns.sum(1, keepdim=True))[None], [4])
    assert found.tolist() == [True] * 4 + [False] * 5


@pytest.mark.parametrize("num_targets", [3, 40])
def test_principal_directions_hold_most_of_the_targets(num_targets: int) -> None:
    gen = torch.Generator().manual_seed(1)
    targets = torch.randn(200, 2, generator=gen) @ torch.randn(2, num_targets, generator=gen)
    directions = principal(targets)
    assert directions.shape == (num_targets, min(num_targets, 16))
    torch.testing.assert_close((targets @ directions).norm(), targets.norm(), rtol=1e-4, atol=1e-4)
