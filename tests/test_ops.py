"""Pure tensor functions against slow or obvious forms."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvzip.errors import BudgetError
from kvzip.ops import attention, ragged, rope, selection

SIZES = st.integers(1, 9)
SEEDS = st.integers(0, 2**16)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(SEEDS, st.integers(1, 3), SIZES, st.integers(0, 9), st.booleans())
def test_attend_equals_softmax(seed: int, groups: int, q_len: int, kv_len: int, capped: bool) -> None:
    query, keys, values = (
        random(seed, 2, 2 * groups, q_len, 8),
        random(seed + 1, 2, 2, kv_len, 8),
        random(seed + 2, 2, 2, kv_len, 8),
    )
    mask = random(seed + 3, 2, 1, q_len, kv_len) > -0.5
    softcap = 2.0 if capped else None
    out, lse = attention.attend(query, keys, values, scale=0.3, mask=mask, softcap=softcap)
    for b in range(2):
        for h in range(2 * groups):
            for t in range(q_len):
                logits = keys[b, h // groups] @ query[b, h, t] * 0.3
                if capped:
                    logits = 2 * torch.tanh(logits / 2)
                seen = mask[b, 0, t]
                if not seen.any():
                    assert lse[b, h, t] == -math.inf and not out[b, h, t].any()
                    continue
                weights = torch.softmax(logits[seen], 0)
                torch.testing.assert_close(out[b, h, t], weights @ values[b, h // groups][seen], atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(lse[b, h, t], torch.logsumexp(logits[seen], 0), atol=1e-5, rtol=1e-5)


def test_attend_is_causal_at_the_lower_right() -> None:
    query, keys, values = random(0, 1, 2, 3, 8), random(1, 1, 1, 5, 8), random(2, 1, 1, 5, 8)
    out, _ = attention.attend(query, keys, values, scale=1.0, is_causal=True)
    for t in range(3):
        alone, _ = attention.attend(query[:, :, t : t + 1], keys[:, :, : t + 3], values[:, :, : t + 3], scale=1.0)
        torch.testing.assert_close(out[:, :, t : t + 1], alone)


@given(SEEDS, SIZES, st.integers(0, 6), st.integers(0, 6))
def test_merge_of_two_parts_is_the_whole(seed: int, q_len: int, first: int, second: int) -> None:
    query, keys, values = (
        random(seed, 1, 4, q_len, 8),
        random(seed + 1, 1, 2, first + second, 8),
        random(seed + 2, 1, 2, first + second, 8),
    )
    whole = attention.attend(query, keys, values, scale=0.5)
    parts = [
        attention.attend(query, keys[:, :, s], values[:, :, s], scale=0.5)
        for s in (slice(0, first), slice(first, None))
    ]
    merged = attention.merge(*parts[0], *parts[1])
    torch.testing.assert_close(merged[0], whole[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(merged[1], whole[1], atol=1e-5, rtol=1e-5)
    assert not torch.isnan(merged[0]).any()


@given(SEEDS, st.integers(1, 3), SIZES, SIZES, st.integers(1, 4))
def test_column_max_equals_softmax_then_max(seed: int, groups: int, q_len: int, kv_len: int, block: int) -> None:
    query, keys = random(seed, 2 * groups, q_len, 8), random(seed + 1, 2, kv_len + 3, 8)
    logits = query.reshape(2, groups, q_len, 8) @ keys.unsqueeze(1).transpose(2, 3) * 0.4
    expected = torch.softmax(logits, -1)[..., :kv_len].amax(dim=(1, 2))
    lse = torch.logsumexp(logits, -1).reshape(2 * groups, q_len)
    got = attention.column_max(query, keys[:, :kv_len], lse, scale=0.4, block_logits=block)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@given(SEEDS, st.integers(1, 3), SIZES, st.integers(0, 9), st.integers(1, 40), st.booleans())
def test_causal_columns_equal_softmax_then_reduce(
    seed: int, groups: int, q_len: int, before: int, block: int, capped: bool
) -> None:
    query, keys, softcap = random(seed, 2 * groups, q_len, 8), random(seed + 1, 2, q_len + before, 8), None
    logits = query.reshape(2, groups, q_len, 8) @ keys.unsqueeze(1).transpose(2, 3) * 0.4
    if capped:
        softcap, logits = 2.0, 2 * torch.tanh(logits / 2)
    logits = logits.masked_fill(~torch.ones(q_len, q_len + before, dtype=torch.bool).tril(before), -math.inf)
    lse, weights = torch.logsumexp(logits, -1).reshape(2 * groups, q_len), torch.softmax(logits, -1)
    options = {"scale": 0.4, "softcap": softcap, "block_logits": block}
    total = attention.causal_columns(query, keys, lse, **options)
    torch.testing.assert_close(total, weights.sum(dim=(1, 2)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(total.sum(-1), torch.full((2,), float(groups * q_len)), atol=1e-4, rtol=1e-4)
    largest = attention.causal_columns(query, keys, lse, reduce="max", **options)
    torch.testing.assert_close(largest, weights.amax(dim=(1, 2)), atol=1e-5, rtol=1e-4)


def test_a_key_that_nobody_looks_at_has_no_weight() -> None:
    keys = random(0, 1, 6, 8)
    keys[0, 2] = -1000 * torch.ones(8)
    query = torch.ones(1, 6, 8)
    lse = torch.logsumexp((query @ keys.transpose(1, 2)).masked_fill(~torch.ones(6, 6).tril().bool(), -math.inf), -1)
    assert attention.causal_columns(query, keys, lse, scale=1.0)[0, 2] == 0


@given(SEEDS, st.integers(-5000, 5000), st.integers(0, 5000), st.sampled_from([8, 6]))
def test_shifting_a_rotated_key_is_rotating_it_elsewhere(seed: int, offset: int, position: int, rotary: int) -> None:
    inv_freq = 1.0 / 100 ** (torch.arange(0, rotary, 2).double() / rotary)
    key = random(seed, 8).double()

    def rotated(at: int) -> torch.Tensor:
        angle = torch.cat([inv_freq, inv_freq]) * at
        turn, rest = key[:rotary], key[rotary:]
        half = torch.cat([-turn[rotary // 2 :], turn[: rotary // 2]])
        return torch.cat([turn * angle.cos() + half * angle.sin(), rest])

    shifted = rope.shift_keys(rotated(position), inv_freq, offset)
    torch.testing.assert_close(shifted, rotated(position + offset), atol=1e-9, rtol=1e-9)


@given(SEEDS, st.integers(1, 4), st.integers(1, 12), st.data())
def test_top_mask_is_exact_and_prefers_the_lower_index(seed: int, rows: int, length: int, data: st.DataObject) -> None:
    scores = random(seed, rows, length).round()  # many ties
    budget = data.draw(st.integers(0, length))
    mask = selection.top_mask(scores, budget)
    for row, kept in zip(scores.tolist(), mask.tolist(), strict=True):
        order = sorted(range(length), key=lambda i: (-row[i], i))
        assert [i for i in range(length) if kept[i]] == sorted(order[:budget])


@settings(max_examples=50)
@given(SEEDS, st.integers(1, 3), st.integers(1, 3), st.integers(1, 8), st.data())
def test_selections_keep_exact_counts(seed: int, layers: int, heads: int, length: int, data: st.DataObject) -> None:
    scores = random(seed, layers, heads, length)
    budget = data.draw(st.integers(1, scores.numel()))
    assert selection.select_global(scores, budget).sum() == budget
    per_layer = selection.select_layer(scores, budget).sum(dim=(1, 2))
    assert per_layer.sum() == budget and per_layer.max() - per_layer.min() <= 1
    per_head = selection.select_uniform(scores, budget).sum(dim=2)
    assert per_head.sum() == budget and per_head.max() - per_head.min() <= 1
    whole = selection.select_heads(scores, budget).sum(dim=2)
    assert set(whole.flatten().tolist()) <= {0, length} and whole.sum() > 0


SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 12))


@given(SEEDS, SHAPES, st.floats(0, 1), st.data())
def test_adakv_is_exact_and_leaves_no_head_bare(seed: int, shape: tuple, alpha: float, data: st.DataObject) -> None:
    scores, (layers, heads, length) = random(seed, *shape).round(decimals=1), shape
    budget = data.draw(st.integers(1, scores.numel()))
    mask = selection.select_adakv(scores, budget, alpha=alpha)
    assert mask.sum() == budget
    assert torch.equal(selection.select_adakv(scores, budget, alpha=0), selection.select_layer(scores, budget))
    for layer, count in zip(mask, selection.split_evenly(budget, layers), strict=True):
        assert layer.sum() == count and layer.sum(-1).min() >= math.floor(alpha * (count // heads) * (1 - 1e-9))
    each = data.draw(st.integers(0, length))
    even = each * layers * heads
    assert torch.equal(selection.select_adakv(scores, even, alpha=1), selection.select_uniform(scores, even))


@given(SEEDS, SHAPES, st.floats(0, 1), st.data())
def test_adakv_keeps_the_best_of_each_head(seed: int, shape: tuple, alpha: float, data: st.DataObject) -> None:
    scores = random(seed, *shape)
    mask = selection.select_adakv(scores, data.draw(st.integers(1, scores.numel())), alpha=alpha)
    for row, kept in zip(scores.flatten(0, 1), mask.flatten(0, 1), strict=True):
        assert kept.all() or not kept.any() or row[kept].min() >= row[~kept].max()


@given(SEEDS, SHAPES, st.floats(0, 1), st.data())
def test_floored_is_exact_and_leaves_no_head_bare(seed: int, shape: tuple, alpha: float, data: st.DataObject) -> None:
    scores, (layers, heads, length) = random(seed, *shape).round(decimals=1), shape
    budget = data.draw(st.integers(1, scores.numel()))
    mask = selection.select_floored(scores, budget, alpha=alpha)
    assert mask.sum() == budget and mask.sum(-1).min() >= math.floor(alpha * (budget // (layers * heads)) * (1 - 1e-9))
    assert torch.equal(selection.select_floored(scores, budget, alpha=0), selection.select_global(scores, budget))
    each = data.draw(st.integers(0, length))
    even = each * layers * heads
    assert torch.equal(selection.select_floored(scores, even, alpha=1), selection.select_uniform(scores, even))
    for row, kept in zip(random(seed, *shape).flatten(0, 1), mask.flatten(0, 1), strict=True):
        assert kept.all() or not kept.any() or row[kept].round(decimals=1).min() >= row[~kept].round(decimals=1).max()


@given(st.integers(0, 2000), st.integers(1, 40), st.floats(1, 1e6), st.data())
def test_pyramids_are_exact_and_never_rise(total: int, layers: int, beta: float, data: st.DataObject) -> None:
    least = -(-total // layers)
    capacity = data.draw(st.integers(max(1, least), 3 * least + 1))
    counts = selection.pyramid_counts(total, layers, capacity, beta)
    assert sum(counts) == total and len(counts) == layers
    assert all(a >= b for a, b in pairwise(counts))
    assert counts[-1] >= 0 and counts[0] <= capacity
    flat = selection.pyramid_counts(total, layers, capacity, 1)
    assert max(flat) - min(flat) <= 1
    assert selection.pyramid_counts(layers * capacity, layers, capacity, beta) == [capacity] * layers


def test_a_pyramid_is_the_line_of_the_paper() -> None:
    """32 layers, a mean of 2040 pairs, beta 20: from 2 * 2040 - 102 down to 102."""
    counts = selection.pyramid_counts(32 * 2040, 32, 10**6, 20)
    for layer, count in enumerate(counts):
        assert abs(count - (3978 - (3978 - 102) * layer / 31)) <= 1


@given(SEEDS, SHAPES, st.integers(0, 3), st.data())
def test_pinned_pairs_count_and_come_first(seed: int, shape: tuple, pinned: int, data: st.DataObject) -> None:
    scores, pinned = random(seed, *shape), min(pinned, shape[2])
    selection.pin_last(scores, pinned)
    budget = data.draw(st.integers(1, scores.numel()))
    for select in (selection.select_uniform, selection.select_pyramid, selection.select_adakv):
        mask = select(scores, budget)
        assert mask.sum() == budget
        if budget >= pinned * shape[0] * shape[1] and select is not selection.select_adakv:
            assert mask[..., shape[2] - pinned :].all()
    each = data.draw(st.integers(pinned, shape[2]))
    even = each * shape[0] * shape[1]
    flat = selection.select_pyramid(scores, even, beta=1)
    assert torch.equal(flat, selection.select_uniform(scores, even))


def test_the_last_pinned_pair_and_the_first_sink_are_kept_longest() -> None:
    scores = selection.pin_first(selection.pin_last(torch.zeros(1, 1, 10), 3), 2)
    order = scores[0, 0].argsort(descending=True, stable=True).tolist()
    assert order[:5] == [0, 1, 9, 8, 7]


def test_layers_that_are_pinned_throughout_leave_the_rest_to_the_others() -> None:
    scores = torch.zeros(3, 2, 4)
    scores[1] = selection.PINNED
    pinned, rest = selection.keep_pinned_layers(scores, 13)
    assert pinned.tolist() == [False, True, False] and rest == 5
    for budget in (7, 8):
        with pytest.raises(BudgetError, match="keep more"):
            selection.keep_pinned_layers(scores, budget)


def test_a_threshold_keeps_what_is_strictly_above() -> None:
    scores = torch.tensor([[[0.5, 0.1, 0.2, selection.PINNED]]])
    assert selection.select_threshold(scores, threshold=0.2).tolist() == [[[True, False, False, True]]]
    with pytest.raises(BudgetError, match=r"give one below 0\.5"):
        selection.select_threshold(scores[..., :3], threshold=0.5)
    with pytest.raises(BudgetError, match="NaN"):
        selection.select_threshold(scores * torch.nan)


def test_the_official_rule_keeps_strictly_more_than_its_threshold() -> None:
    scores = torch.tensor([[[4.0, 3.0, 2.0, 1.0]]])
    assert selection.select_above(scores, 0.75).tolist() == [[[True, True, False, False]]]
    assert selection.select_above(torch.ones(1, 1, 4), 0.5).sum() == 0
    assert selection.select_above(scores, 1.0).all()


@pytest.mark.parametrize("budget", [-1, 5])
def test_top_mask_refuses_a_budget_out_of_range(budget: int) -> None:
    with pytest.raises(BudgetError, match="out of range"):
        selection.top_mask(torch.zeros(1, 4), budget)


def test_top_mask_refuses_nan() -> None:
    with pytest.raises(BudgetError, match="NaN"):
        selection.top_mask(torch.tensor([[0.0, float("nan")]]), 1)


@given(SEEDS, st.integers(1, 3), st.integers(1, 9))
def test_pack_and_unpack(seed: int, heads: int, length: int) -> None:
    pairs, mask = random(seed, heads, length, 4), random(seed + 1, heads, length) > 0
    packed, offsets = ragged.pack(pairs, mask), ragged.cu_seqlens_of(mask).tolist()
    assert offsets[0] == 0 and offsets[-1] == len(packed)
    for head in range(heads):
        assert torch.equal(packed[offsets[head] : offsets[head + 1]], pairs[head][mask[head]])
    assert torch.equal(ragged.unpack(packed, mask), pairs * mask.unsqueeze(-1))


@given(SEEDS, st.integers(1, 3), st.integers(0, 20))
def test_bits_round_trip(seed: int, heads: int, length: int) -> None:
    mask = random(seed, 2, heads, length) > 0
    bits = ragged.pack_bits(mask)
    assert bits.numel() == -(-mask.numel() // 8)
    assert torch.equal(ragged.unpack_bits(bits, tuple(mask.shape)), mask)
