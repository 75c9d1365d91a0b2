"""The portable layout on tiny models: what an engine reads from it, what it loses, what is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine import engine_logits, greedy, same_pairs, session_logits
from tiny import llama, tiny_model, tiny_tokenizer
from torch import Tensor

import kvzip
from kvzip.compress import FullContext
from kvzip.export import make_portable
from kvzip.portable import PortableContext, uniform_mask
from kvzip.store import portable

TEXT = "The lamp was lit in May. It burned all night, and no ship was lost; the keeper slept at dawn.\n" * 10
NOISE = {"atol": 2e-3, "rtol": 1e-3}  # as in test_families
ASKED = torch.randint(3, 300, (30,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=["llama", "llama3.1", "phi3", "gemma2", "gemma3"])
def case(request: pytest.FixtureRequest) -> SimpleNamespace:
    """A model with a text, read once and compressed with counts of their own for all heads."""
    llm = kvzip.wrap(tiny_model(request.param), tiny_tokenizer())
    prefilled = llm.prefill(TEXT)
    return SimpleNamespace(llm=llm, prefilled=prefilled, context=prefilled.compress(0.4))


@pytest.fixture(scope="module")
def small() -> SimpleNamespace:
    """A model of two layers with a short text."""
    llm = kvzip.wrap(llama(2), tiny_tokenizer())
    return SimpleNamespace(llm=llm, prefilled=llm.prefill(TEXT[:188]))


def tensors_of(context: PortableContext) -> list[Tensor]:
    return [tensor for layer in context.layers for tensor in (layer.keys, layer.values)]


def assert_close(a: PortableContext, b: PortableContext) -> None:
    for x, y in zip(tensors_of(a), tensors_of(b), strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


def never_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FullContext, "prefill", lambda *args, **kwargs: pytest.fail("the text was read again"))


# ---- what an engine gets


def test_a_stock_cache_answers_as_the_same_pairs_do(case: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "doc.kvp.safetensors"
    info = case.context.export(path, 0.5)
    context, data = portable.read(path), same_pairs(case.prefilled, case.context.data, 0.5)
    assert {n for i in data.full_layers for n in data.pairs_per_head[i]} == {info.num_pairs} == {context.num_pairs}
    expected = session_logits(case.llm, data, ASKED)
    torch.testing.assert_close(engine_logits(case.llm, context, ASKED), expected, **NOISE)
    shifted_wrong = engine_logits(case.llm, context, ASKED, -info.num_pairs)  # by N in all
    assert (shifted_wrong - expected).abs().max() > 0.1, "the rotation must matter"
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    own = case.llm.model.generate(
        ASKED[None], past_key_values=kvzip.CompressedContext(case.llm, data).cache(), **options
    )
    assert greedy(case.llm, context, ASKED, 12) == own[0, len(ASKED) :].tolist()


def test_a_full_text_is_exact_too(case: SimpleNamespace) -> None:
    context = make_portable(case.llm, case.prefilled.compress(1.0).data)
    assert context.num_pairs == context.logical_len
    expected = session_logits(case.llm, case.prefilled.compress(1.0).data, ASKED)
    torch.testing.assert_close(engine_logits(case.llm, context, ASKED), expected, **NOISE)


def test_each_head_keeps_its_best_by_rank(case: SimpleNamespace) -> None:
    data = case.context.data
    for count in (3, 200, data.context_len - 1):
        mask = uniform_mask(data, count)
        for kept, held, ranks in zip(*(t.flatten(0, 1) for t in (mask, data.keep_mask, data.ranks)), strict=True):
            order = sorted(range(len(ranks)), key=lambda i: (-int(held[i]), -int(ranks[i]), i))
            assert kept.nonzero().flatten().tolist() == sorted(order[:count])


def test_ranks_choose_what_the_scores_of_a_uniform_budget_choose(case: SimpleNamespace) -> None:
    uniform = case.prefilled.compress(kvzip.CompressOptions(keep_ratio=0.5, method="kvzip+uniform")).data
    count = int(uniform.keep_mask.sum(-1).min())
    same = uniform_mask(case.context.data, count) & uniform.keep_mask
    assert same.sum() > 0.97 * uniform.keep_mask.sum()


def test_slots_outside_a_window_are_zeros(case: SimpleNamespace) -> None:
    context = make_portable(case.llm, case.context.data, 0.5)
    total, indices = context.num_pairs, range(len(context.layers))
    for index in indices:
        whole = context.slots(index, 0, total)
        seen = len(context.layers[index].keys)
        for part, stored in zip(whole, (context.layers[index].keys, context.layers[index].values), strict=True):
            assert len(part) == total and not part[: total - seen].any() and part[total - seen :].equal(stored)
        for start, stop in ((0, 0), (5, 9), (total - 25, total - 20), (total - 24, total), (total - 3, total - 1)):
            for part, both in zip(context.slots(index, start, stop), whole, strict=True):
                assert part.equal(both[start:stop])
        assert context.slots(index, total - 3, total)[0].data_ptr() == context.layers[index].keys[-3:].data_ptr()


# ---- what is read again, and the loss


def test_one_count_is_converted_without_reading(small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    context = small.prefilled.compress(kvzip.CompressOptions(keep_ratio=0.5, method="kvzip+uniform"))
    biased = tuple(replace(x, bias=torch.zeros(len(x.keys))) for x in context.data.layers)  # which has no room
    read_again = make_portable(small.llm, replace(context.data, layers=biased))
    assert read_again.info.prefill_s > 0
    never_reads(monkeypatch)
    converted = make_portable(small.llm, context.data)
    assert_close(converted, read_again)
    assert converted.info.loss == context.data.info.loss == converted.origin.loss
    assert converted.info.keep_ratio == 0.5 and converted.info.prefill_s == 0


def test_fewer_pairs_are_cut_from_the_file_unless_the_loss_is_measured(
    small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = small.prefilled.compress(kvzip.CompressOptions(keep_ratio=0.7, method="kvzip+uniform")).data
    read_again = make_portable(small.llm, data, 0.4)
    never_reads(monkeypatch)
    converted = make_portable(small.llm, data, 0.4, certify=False)
    assert_close(converted, read_again)
    assert converted.info.loss is None and converted.origin.loss == data.info.loss


def test_the_loss_of_the_same_count_is_measured(case: SimpleNamespace) -> None:
    context = make_portable(case.llm, case.context.data)
    expected = case.prefilled._certifier.certify(same_pairs(case.prefilled, case.context.data))
    assert expected is not None and context.info.loss is not None
    assert context.info.loss["kl"] == pytest.approx(expected["kl"], rel=1e-3)
    assert context.info.loss["kl"] > 0 and context.origin.loss == case.context.data.info.loss
    assert context.info.prefill_s > 0
    assert make_portable(case.llm, case.context.data, certify=False).info.loss is None


@pytest.mark.parametrize(
    ("method", "left_out"),
    [
        ("kvzip+refit", ("biases",)),
        ("kvzip+int4", ("codes",)),
        ("clusterkv:skip_first=0", ("clusters",)),
        ("leankv", ("codes",)),
    ],
)
def test_what_has_no_room_is_left_out_and_named(
    small: SimpleNamespace, method: str, left_out: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVZIP_CACHE", str(tmp_path))
    ratio = None if method.startswith(("leankv", "clusterkv")) else 0.5
    data = small.prefilled.compress(kvzip.CompressOptions(keep_ratio=ratio, method=method)).data
    context = make_portable(small.llm, data)
    assert context.origin.left_out == left_out
    expected = session_logits(small.llm, same_pairs(small.prefilled, data), ASKED)
    torch.testing.assert_close(engine_logits(small.llm, context, ASKED), expected, **NOISE)


# ---- refusals


def test_a_choice_without_ranks_is_refused(small: SimpleNamespace) -> None:
    data = replace(small.prefilled.compress(0.5).data, ranks=None)
    with pytest.raises(kvzip.InputError, match=r"no ranks .* kvzip\+uniform"):
        make_portable(small.llm, data)


def test_shared_layers_are_refused(small: SimpleNamespace) -> None:
    data = small.prefilled.compress(0.5).data
    shared = replace(data, layers=(data.layers[0],) * 2)
    with pytest.raises(kvzip.InputError, match="share pairs"):
        make_portable(small.llm, shared)


@pytest.mark.parametrize("keep_ratio", [0, -1.0, 1.5, float("nan"), 0.001])
def test_an_impossible_keep_ratio_is_refused(small: SimpleNamespace, keep_ratio: float) -> None:
    with pytest.raises(kvzip.BudgetError, match="keep ratio"):
        make_portable(small.llm, small.prefilled.compress(0.5).data, keep_ratio)


@pytest.mark.parametrize("length", [188, 10])
def test_fewer_slots_than_a_window_sees_are_refused_with_the_least_ratio(length: int) -> None:
    """At the ratio that the refusal names it works and is exact, a little below it does not."""
    llm = kvzip.wrap(tiny_model("gemma3"), tiny_tokenizer(chat_template=None))
    prefilled = llm.prefill(TEXT[:length])
    data = prefilled.compress(0.5).data
    with pytest.raises(kvzip.BudgetError, match="sliding windows see") as caught:
        make_portable(llm, data, 0.1)
    least = float(re.search(r"keep ratio of ([\d.]+) or more", str(caught.value))[1])
    context = make_portable(llm, data, least)
    assert context.num_pairs == min(23, context.logical_len)
    expected = session_logits(llm, same_pairs(prefilled, data, least), ASKED)
    torch.testing.assert_close(engine_logits(llm, context, ASKED), expected, **NOISE)
    with pytest.raises(kvzip.BudgetError):
        make_portable(llm, data, least - 1.01 / length)
