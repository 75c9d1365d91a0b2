"""Two precisions in one context: LeanKV, and levels behind other scorers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from stored import in_floats
from tiny import tiny_model, tiny_tokenizer
from torch import Tensor

import kvzip
from kvzip.context import RaggedLayer
from kvzip.errors import BudgetError
from kvzip.methods import parse_method
from kvzip.transforms.levels import Levels
from kvzip.transforms.quantize import Quantize

TEXT = "The quick brown fox jumps over the lazy dog. " * 6
WINDOW = 16
LEANKV = f"leankv:window_size={WINDOW}"
ALL_FLOATS = "high_key_bits=16,high_value_bits=16,low_key_bits=16,low_value_bits=16"


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma3"])
def case(request: pytest.FixtureRequest) -> SimpleNamespace:
    llm = kvzip.wrap(tiny_model(request.param, seed=3), tiny_tokenizer())
    return SimpleNamespace(llm=llm, prefilled=llm.prefill(TEXT))


def made(case: SimpleNamespace, method: str, keep_ratio: float | None = None) -> kvzip.CompressedContext:
    return case.prefilled.compress(kvzip.CompressOptions(keep_ratio=keep_ratio, method=method))


def logits(context: kvzip.CompressedContext) -> Tensor:
    ids = torch.tensor([context.llm.question_ids("Who jumps?")])
    with torch.inference_mode():
        return context.llm.model(ids, past_key_values=context.cache()).logits


def thresholds(case: SimpleNamespace) -> tuple[float, float]:
    """Two that part the scores in three."""
    scores = case.prefilled.scores(parse_method(LEANKV))
    low, high = scores[..., :-WINDOW].flatten().quantile(torch.tensor([0.3, 0.7])).tolist()
    return low, high


def test_each_pair_is_high_low_or_gone_by_its_score(case: SimpleNamespace) -> None:
    scores, (low, high) = case.prefilled.scores(parse_method(LEANKV)), thresholds(case)
    context = made(case, f"{LEANKV},threshold={low},high={high}")
    data = context.data
    floats = made(case, "kvzip", 1.0).data
    assert torch.equal(data.keep_mask, scores > low) and 0.5 < data.info.keep_ratio < 0.9
    for index, layer in enumerate(data.full_layers):
        whole = floats.layers[layer]
        is_high = torch.nn.functional.pad(scores[index] > high, (data.prefix_len, 0), value=True)
        is_low = torch.nn.functional.pad((scores[index] > low) & (scores[index] <= high), (data.prefix_len, 0))
        levels = data.layers[layer].levels
        assert len(levels) == 2
        for level, mask, bits in zip(levels, (is_high, is_low), ((8, 4), (4, 2)), strict=True):
            assert level.seqlens[0] >= 0 and (level.keys.layout.bits, level.values.layout.bits) == bits
            assert [end - start for start, end in zip(level.offsets, level.offsets[1:], strict=False)] == mask.sum(
                -1
            ).tolist()
            alone = RaggedLayer(whole.keys[mask.flatten()], whole.values[mask.flatten()], level.cu_seqlens)
            expected = Quantize(key_bits=bits[0], value_bits=bits[1], key_axis="token", group_size=1024).apply(alone)
            assert torch.equal(level.keys.codes, expected.keys.codes)
            assert torch.equal(level.values.codes, expected.values.codes)
        assert is_high[:, -WINDOW:].all() and is_high[:, : data.prefix_len].all()


def test_levels_of_floats_are_plain_eviction(case: SimpleNamespace) -> None:
    low, high = thresholds(case)
    levels = made(case, f"{LEANKV},threshold={low},high={high},{ALL_FLOATS}")
    plain = made(case, f"mean-attention:window_size={WINDOW}+threshold:threshold={low}")
    assert torch.equal(levels.data.keep_mask, plain.data.keep_mask)
    assert any(layer.lower is not None for layer in levels.data.layers)
    torch.testing.assert_close(logits(levels), logits(plain), atol=1e-4, rtol=1e-4)


def test_thresholds_of_zero_in_floats_are_the_full_cache(case: SimpleNamespace) -> None:
    context = made(case, f"{LEANKV},threshold=0,high=0,{ALL_FLOATS}")
    assert context.data.keep_mask.all() and context.data.info.keep_ratio == 1
    torch.testing.assert_close(logits(context), logits(made(case, "kvzip", 1.0)), atol=1e-5, rtol=1e-5)


def test_a_higher_threshold_never_keeps_more_and_the_window_stays(case: SimpleNamespace) -> None:
    counts = []
    for threshold in (0, 0.3, 1, 3, 1e6):
        mask = made(case, f"{LEANKV},threshold={threshold},high=2").data.keep_mask
        assert mask[..., -WINDOW:].all()
        counts.append(int(mask.sum()))
    assert counts == sorted(counts, reverse=True) and counts[0] == mask.numel()
    assert counts[-1] == WINDOW * mask.shape[0] * mask.shape[1]


def test_reading_codes_of_both_levels_gives_the_same_logits(case: SimpleNamespace) -> None:
    low, high = thresholds(case)
    context = made(case, f"{LEANKV},threshold={low},high={high}")

    floats = replace(context.data, layers=tuple(map(in_floats, context.data.layers)))
    found = kvzip.CompressedContext(case.llm, floats)
    torch.testing.assert_close(logits(context), logits(found), atol=1e-4, rtol=1e-4)
    assert context.data.kv_nbytes < floats.kv_nbytes


def test_saved_and_opened_it_goes_on_the_same(case: SimpleNamespace, tmp_path: Path) -> None:
    low, high = thresholds(case)
    context = made(case, f"{LEANKV},threshold={low},high={high}")
    context.save(tmp_path / "doc.kvz")
    opened = case.llm.open(tmp_path / "doc.kvz")
    assert torch.equal(logits(opened), logits(context)) and opened.data.kv_nbytes == context.data.kv_nbytes
    assert opened.data.info.method == context.data.info.method == parse_method(context.data.info.method).composition


def test_all_pairs_of_one_level_make_no_second(case: SimpleNamespace) -> None:
    data = made(case, f"{LEANKV},threshold=0,high=0").data
    assert all(layer.lower is None for layer in data.layers)
    assert {data.layers[i].keys.layout.bits for i in data.full_layers} == {8}
    for high in ("1e29", "1e40"):  # what is pinned is above them, and so is the prefix
        data = made(case, f"{LEANKV},threshold=0,high={high}").data
        for layer in (data.layers[i] for i in data.full_layers):
            assert layer.keys.layout.bits == 8 and layer.offsets[1] == WINDOW + data.prefix_len


def test_levels_behind_another_scorer_need_scores_even_where_all_stays(case: SimpleNamespace) -> None:
    scores = case.prefilled.scores(parse_method("kvzip"))
    high = scores.flatten().median().item()
    data = made(case, f"kvzip+levels:high={high}", 1.0).data
    assert data.keep_mask.all()
    counts = [sum(b - a for a, b in zip(x.offsets, x.offsets[1:], strict=False)) for x in data.layers if x.lower]
    prefix = data.prefix_len * data.kept_shape[0] * data.kept_shape[1]
    assert sum(counts) - prefix == int((scores > high).sum())


def test_a_budget_in_bytes_holds(case: SimpleNamespace) -> None:
    least = made(case, "kvzip+levels:high=0.5", 1e-9).data.kv_nbytes
    options = kvzip.CompressOptions(budget=f"{least + 9000}B", method="kvzip+levels:high=0.5")
    assert case.prefilled.compress(options).data.kv_nbytes <= least + 9000


def test_leankv_decides_itself_how_much_stays() -> None:
    with pytest.raises(BudgetError, match=r"keep_ratio 0\.5 can't be asked of method 'leankv'"):
        kvzip.CompressOptions(method="leankv", keep_ratio=0.5)
    assert Levels().pair_nbytes(64, 4) == 64 + 32 + 2 * 4


def test_a_window_longer_than_the_text_keeps_it_all(case: SimpleNamespace) -> None:
    data = case.llm.compress("one two three", method="leankv:threshold=5").data
    assert data.keep_mask.all() and all(layer.lower is None for layer in data.layers)
