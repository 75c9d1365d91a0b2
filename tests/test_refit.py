"""Refitted pairs: least squares against direct solutions, and what they must do in cases that can be worked out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvzip.ops.refit import MAX_BIAS, Block, Fit, Moments, Rounding, refit, with_mass


def case(seed: int, num_queries: int = 60, num_pairs: int = 12, sharpness: float = 2.0) -> tuple[Tensor, Tensor]:
    """Attention [R, S] of random queries, a tenth of it on a sink outside of the block, and values [S, D]."""
    gen = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(num_queries, num_pairs + 1, generator=gen)
    return torch.softmax(logits, dim=1)[:, :-1], torch.randn(num_pairs, 5, generator=gen)


def block_of(attention: Tensor, values: Tensor, keep_mask: Tensor, rest: Tensor | None = None) -> Block:
    rest = torch.zeros(len(attention), values.shape[1]) if rest is None else rest
    mass = attention.sum(1, keepdim=True)
    took, beside = torch.cat([attention @ values, mass], dim=1), torch.cat([rest, 1 - mass], dim=1)
    return Block(attention[:, keep_mask], took, beside)


def judged(block: Block, values: Tensor, is_held_out: Tensor, read_back: Rounding | None = None) -> Fit | None:
    """`refit`, by which of the queries have no part in the fit."""
    fitted, judge = (
        Block(block.kept[rows], block.took[rows], block.beside[rows]) for rows in (~is_held_out, is_held_out)
    )
    return refit(fitted, judge, values, read_back)


def direct(columns: Tensor, target: Tensor, start: Tensor, pull: float) -> Tensor:
    """argmin |columns x - target|^2 + pull |x - start|^2, as one least-squares problem in float64."""
    eye = math.sqrt(pull) * torch.eye(columns.shape[1], dtype=torch.float64)
    rows = torch.cat([columns.double(), eye])
    wanted = torch.cat([target.double(), math.sqrt(pull) * start.double()])
    return torch.linalg.lstsq(rows, wanted).solution.float()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.01, 0.1, 1.0]), st.integers(1, 11))
def test_fits_are_the_direct_solutions(seed: int, ridge: float, num_kept: int) -> None:
    attention, values = case(seed)
    kept, own = attention[:, :num_kept], values[:num_kept]
    moments = Moments.of(block_of(attention, values, torch.arange(12) < num_kept))
    pull = ridge * float(moments.gram.diagonal().mean())
    expected = direct(kept, attention.sum(1, keepdim=True), torch.ones(num_kept, 1), pull).squeeze(1)
    weights = moments.fit_weights(ridge)
    if expected.min() > math.exp(-MAX_BIAS) and expected.max() < math.exp(MAX_BIAS):
        torch.testing.assert_close(weights, expected, atol=2e-3, rtol=2e-3)
    else:
        assert weights.min() >= math.exp(-MAX_BIAS) * 0.999 and weights.max() <= math.exp(MAX_BIAS) * 1.001
        loss = lambda w: float((kept @ w - attention.sum(1)).square().sum() + pull * (w - 1).square().sum())  # noqa: E731
        clamped = expected.clamp(math.exp(-MAX_BIAS), math.exp(MAX_BIAS))
        assert loss(weights) <= loss(clamped) * 1.001, "the gradient steps must not lose what clamping had"
    weighted = kept * weights
    pull = ridge * float((weighted.square().sum(0)).mean())
    torch.testing.assert_close(
        moments.fit_values(weights, own, ridge),
        direct(weighted, attention @ values, own, pull),
        atol=5e-3, rtol=5e-3,
    )  # fmt: skip


def test_moments_of_parts_add_up() -> None:
    attention, values = case(1)
    block, first, rest = block_of(attention, values, torch.arange(12) < 4), slice(20), slice(20, None)
    whole, *halves = map(Moments.of, (block, block.part(first), block.part(rest)))
    torch.testing.assert_close(whole.gram, halves[0].gram + halves[1].gram)
    torch.testing.assert_close(whole.took, halves[0].took + halves[1].took)


def test_one_of_several_equal_keys_stands_for_all_of_them() -> None:
    """c pairs with one key: the one that stays gets weight c, and the mean of their values."""
    gen = torch.Generator().manual_seed(0)
    keys, values = torch.randn(6, 8, generator=gen), torch.randn(6, 5, generator=gen)
    keys[2:] = keys[2]
    queries = torch.randn(400, 8, generator=gen)
    attention = torch.softmax(queries @ keys.T, dim=1)
    keep_mask = torch.tensor([True, True, True, False, False, False])
    moments = Moments.of(block_of(attention, values, keep_mask))
    weights = moments.fit_weights(1e-5)
    torch.testing.assert_close(weights, torch.tensor([1.0, 1.0, 4.0]), atol=1e-2, rtol=1e-2)
    fitted = moments.fit_values(weights, values[keep_mask], 1e-5)
    torch.testing.assert_close(fitted[2], values[2:].mean(0), atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(fitted[:2], values[:2], atol=1e-2, rtol=1e-2)


def test_where_nothing_is_gone_there_is_nothing_to_fit() -> None:
    attention, values = case(2)
    held_out = torch.arange(60) % 4 == 3
    assert judged(block_of(attention, values, torch.ones(12, dtype=torch.bool)), values, held_out) is None


def test_pairs_that_no_query_looks_at_stay_as_they_are() -> None:
    """Their squares are too small for float32; least squares would fail."""
    attention, values = case(5)
    attention[:, :2] = 1e-25
    keep_mask = torch.arange(12) < 2
    assert judged(block_of(attention, values, keep_mask), values[keep_mask], torch.arange(60) % 4 == 3) is None


def test_held_out_queries_judge() -> None:
    """Queries that have a pattern are helped; where the held-out ones are of another kind, nothing is changed."""
    attention, values = case(3, num_queries=400)
    keep_mask = torch.arange(12) < 5
    held_out = torch.arange(400) % 4 == 3
    block, plain = block_of(attention, values, keep_mask), Fit(torch.ones(5), values[keep_mask])
    found = judged(block, plain.values, held_out)
    assert found is not None
    assert block.loss(found) < 0.9 * block.loss(plain)
    other = attention.clone()
    other[held_out] = 0
    other[held_out, 0] = 1.0  # they see one pair that stays, and need nothing else
    assert judged(block_of(other, values, keep_mask), plain.values, held_out) is None


def test_the_ridge_is_chosen_by_values_as_they_are_read_back() -> None:
    """Where large changes are lost on the way to the store, a larger ridge is taken, or nothing is changed at all."""
    attention, values = case(6, num_queries=400)
    keep_mask, held_out = torch.arange(12) < 7, torch.arange(400) % 4 == 3
    block, own = block_of(attention, values, keep_mask), values[keep_mask]
    exact = judged(block, own, held_out)
    assert exact is not None

    def coarse(fitted: Tensor) -> Tensor:
        return own + (fitted - own).clamp(-0.05, 0.05)

    found = judged(block, own, held_out, coarse)
    assert found is None or float((found.values - own).norm()) < float((exact.values - own).norm())
    assert judged(block, own, held_out, lambda fitted: fitted + 100 * (fitted - own)) is None


def test_keys_that_are_stored_otherwise_are_made_up_for() -> None:
    """All pairs stay, with attention that their rounded keys would draw: mass and outputs are mended."""
    attention, values = case(7, num_queries=400)
    noise = torch.randn(12, generator=torch.Generator().manual_seed(1))
    kept = attention * (0.3 * noise).exp()
    took = attention @ with_mass(values)
    block = Block(kept, took, torch.tensor([0.0] * 5 + [1.0]) - took * torch.tensor([0.0] * 5 + [1.0]))
    found = judged(block, values, torch.arange(400) % 4 == 3)
    assert found is not None
    torch.testing.assert_close(found.weights.log(), -0.3 * noise, atol=0.1, rtol=0.1)
    assert block.loss(found) < 0.05 * block.loss(Fit(torch.ones(12), values))


def test_the_loss_is_of_what_attention_puts_out() -> None:
    attention, values = case(4, num_queries=3, num_pairs=4)
    keep_mask = torch.tensor([True, False, True, False])
    weights, fitted = torch.tensor([1.5, 0.7]), torch.ones(2, 5)
    sink = torch.randn(5)
    rest = (1 - attention.sum(1, keepdim=True)) * sink
    block = block_of(attention, values, keep_mask, rest)
    total = 0.0
    for row in attention:
        mass_outside = 1 - float(row.sum())
        before = mass_outside * sink + sum(float(row[i]) * values[i] for i in range(4))
        masses = [1.5 * float(row[0]), 0.7 * float(row[2])]
        after = (mass_outside * sink + sum(masses) * torch.ones(5)) / (mass_outside + sum(masses))
        total += float((after - before).square().sum())
    assert block.loss(Fit(weights, fitted)) == pytest.approx(total / 3, rel=1e-4)
