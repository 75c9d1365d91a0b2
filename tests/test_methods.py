"""Every method by what must hold for it, and one of one's own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

import kvzip
from kvzip.budget import BUDGET_KINDS
from kvzip.compress import FullContext
from kvzip.errors import BudgetError, InputError, KVZipError, ModelError, UnknownNameError
from kvzip.methods import ALIASES, parse_method
from kvzip.ops.rope import shift_keys
from kvzip.profilers import PROFILERS
from kvzip.scorers import SCORERS

PARSED = {name: parse_method(name) for name in ALIASES}
METHODS = [n for n, m in PARSED.items() if n != "kvzip-head" and m.scorer is not None and not m.decides_count]
TEXT = "The quick brown fox jumps over the lazy dog. " * 4


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma3"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[kvzip.LLM]:
    llm = kvzip.wrap(tiny_model(request.param, seed=3), tiny_tokenizer())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVZIP_CACHE", str(tmp_path_factory.mktemp("cache")))
        for kind in PROFILERS:
            llm.calibrate(kind, 2 * TEXT)
        llm.distill([2 * TEXT])
        yield llm


@pytest.fixture(scope="module")
def prefilled(llm: kvzip.LLM) -> kvzip.Prefilled:
    return llm.prefill(TEXT)


@pytest.mark.parametrize("method", METHODS)
def test_counts_are_exact_and_kept_rows_are_copies(prefilled: kvzip.Prefilled, method: str) -> None:
    full = prefilled._full
    total = full.amounts().num_pairs
    for budget in (1, 2, 77, total // 3, total - 1):
        data = prefilled.compress(kvzip.CompressOptions(budget=budget, method=method)).data
        assert data.keep_mask.sum() == budget
        for index, layer in enumerate(data.full_layers):
            prefix = torch.ones(data.keep_mask.shape[1], data.prefix_len, dtype=torch.bool)
            mask = torch.cat([prefix, data.keep_mask[index]], dim=1)
            keys, values = (t[0][mask] for t in full.cache.layers[layer].read(slice(0, full.length)))
            inv_freq = full.engine.geometry.layers[layer].inv_freq
            assert torch.equal(data.layers[layer].values, values)
            assert torch.equal(data.layers[layer].keys, shift_keys(keys, inv_freq, -full.length))


@pytest.mark.parametrize("method", METHODS)
def test_keeping_everything_is_the_full_cache(prefilled: kvzip.Prefilled, method: str) -> None:
    scores = prefilled.scores(parse_method(method))
    chosen = parse_method(method)
    profile = prefilled.llm.profile_for(chosen.budget_kind.needs)
    assert chosen.budget_kind(scores, scores.numel(), dict(chosen.budget.options), profile).all()
    whole, plain = (prefilled.compress(kvzip.CompressOptions(keep_ratio=1.0, method=m)) for m in (method, "kvzip"))
    assert torch.equal(whole.data.keep_mask, plain.data.keep_mask)
    assert whole.ask("why?", max_new_tokens=4).token_ids == plain.ask("why?", max_new_tokens=4).token_ids


@pytest.mark.parametrize("method", METHODS)
def test_one_reading_serves_as_well_as_one_of_its_own(
    llm: kvzip.LLM, prefilled: kvzip.Prefilled, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = prefilled.compress(kvzip.CompressOptions(keep_ratio=0.4, method=method))
    monkeypatch.setattr(FullContext, "read_again", lambda *args, **kwargs: pytest.fail("read again"))
    own = llm.compress(TEXT, 0.4, method=method)
    assert torch.equal(own.data.keep_mask, shared.data.keep_mask)
    assert own.data.info.method == shared.data.info.method == parse_method(method).composition
    assert own.data.info.score_s > 0 and own.data.info.prefill_s > 0


def test_the_window_stays_and_the_pyramid_falls(prefilled: kvzip.Prefilled) -> None:
    for method, size in (("snapkv", 32), ("pyramidkv", 8), ("adakv", 32), ("h2o", 32), ("tova", 1)):
        data = prefilled.compress(kvzip.CompressOptions(keep_ratio=0.3, method=method)).data
        assert data.keep_mask[..., -size:].all(), method
        counts = data.keep_mask.sum(dim=(1, 2))
        assert (counts.diff() <= 0).all() or method != "pyramidkv"
    counts = prefilled.compress(kvzip.CompressOptions(keep_ratio=0.3, method="pyramidkv")).data.keep_mask.sum(
        dim=(1, 2)
    )
    assert counts[0] > 2 * counts[-1]
    few = prefilled.compress(kvzip.CompressOptions(budget=6 * data.keep_mask.shape[0], method="snapkv")).data.keep_mask
    assert few[..., -3:].all() and not few[..., :-3].any()  # the most recent ones, where the window does not fit


def test_tova_keeps_the_same_tokens_in_all_heads_of_a_layer(prefilled: kvzip.Prefilled) -> None:
    scores = prefilled.scores(parse_method("tova"))
    pairs = 50 * scores.shape[0] * scores.shape[1]
    mask = prefilled.compress(kvzip.CompressOptions(budget=pairs, method="tova")).data.keep_mask
    assert (mask == mask[:, :1]).all()


def test_refreekv_decides_itself_and_is_streaming_with_that_count(llm: kvzip.LLM, prefilled: kvzip.Prefilled) -> None:
    data = llm.compress(TEXT, method="refreekv:whole_layers=1,threshold=0.1").data
    mask, info = data.keep_mask, data.info
    assert (info.keep_ratio_asked, info.budget_asked) == (None, None)
    assert info.keep_ratio == mask.sum() / mask.numel() < 1
    assert mask[0].all() and (mask == mask[:, :1]).all()
    again = prefilled.compress(kvzip.CompressOptions(method="refreekv:whole_layers=1,threshold=0.1")).data
    assert torch.equal(again.keep_mask, mask)
    per_head = mask.shape[1] * mask.sum(dim=-1)[1:, 0]
    streaming = prefilled.scores(parse_method("streaming-llm:num_sinks=0"))
    for layer, pairs in enumerate(per_head.tolist(), start=1):
        expected = BUDGET_KINDS["uniform"](streaming[layer : layer + 1], pairs, {})
        assert torch.equal(mask[layer : layer + 1], expected), "the prefix is longer than the sinks"


def test_a_threshold_of_any_scores_keeps_what_is_above(prefilled: kvzip.Prefilled) -> None:
    scores = prefilled.scores(parse_method("kvzip"))
    data = prefilled.compress(kvzip.CompressOptions(method="kvzip+threshold:threshold=0.02")).data
    assert torch.equal(data.keep_mask, scores > 0.02) and 0 < data.info.keep_ratio < 1
    with pytest.raises(BudgetError, match="give one below"):
        prefilled.compress(kvzip.CompressOptions(method="kvzip+threshold:threshold=1"))


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"keep_ratio": 0.3}, "keep_ratio 0.3"),
        ({"keep_ratio": 1.0}, "keep_ratio 1.0"),
        ({"budget": "64MiB"}, "budget '64MiB'"),
        ({"faithful": True}, "faithful True"),
    ],
)
def test_nothing_may_be_asked_of_a_method_that_decides(options: dict, hint: str) -> None:
    with pytest.raises(BudgetError, match=f"{hint} can't be asked of method 'refreekv'.*leave it out") as caught:
        kvzip.CompressOptions(method="refreekv", **options)
    assert "\n" not in str(caught.value)


def test_skipped_layers_keep_everything(prefilled: kvzip.Prefilled) -> None:
    data = prefilled.compress(kvzip.CompressOptions(keep_ratio=0.7, method="l2-norm:skip_layers=1")).data
    assert data.keep_mask[1].all() and not data.keep_mask[0].all()
    assert data.keep_mask.sum() == round(0.7 * data.keep_mask.numel())
    counts = data.keep_mask[[i for i in range(len(data.keep_mask)) if i != 1]].sum(-1)
    assert counts.max() - counts.min() <= 1
    plain = prefilled.compress(kvzip.CompressOptions(keep_ratio=0.7, method="l2-norm")).data.keep_mask
    assert not plain[1].all()


def test_num_sinks_and_seed_are_used(prefilled: kvzip.Prefilled) -> None:
    def keep(method: str) -> torch.Tensor:
        return prefilled.compress(kvzip.CompressOptions(keep_ratio=0.2, method=method)).data.keep_mask

    assert keep("streaming-llm:num_sinks=9")[..., :9].all() and not keep("streaming-llm:num_sinks=0")[..., 0].any()
    assert not torch.equal(keep("random"), keep("random:seed=1")) and torch.equal(keep("random"), keep("random:seed=0"))


@pytest.mark.parametrize(
    ("method", "hint"),
    [
        ("snapkv:window_size=5000", "longer than the context"),
        ("h2o:num_recent=5000", "more than the context"),
        ("l2-norm:skip_layers=7", "full-attention layers 0 to"),
    ],
)
def test_what_does_not_fit_the_text_is_refused_before_it_is_read(
    llm: kvzip.LLM, method: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FullContext, "_read", lambda *args: pytest.fail("read"))
    with pytest.raises(InputError, match=hint):
        llm.compress(TEXT, 0.3, method=method)


def test_a_budget_below_what_skipped_layers_need_is_refused(prefilled: kvzip.Prefilled) -> None:
    with pytest.raises(BudgetError, match="let fewer layers keep everything"):
        prefilled.compress(kvzip.CompressOptions(keep_ratio=0.1, method="l2-norm:skip_layers=0"))


def test_a_model_without_a_plain_projection_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = kvzip.wrap(tiny_model("llama"), tiny_tokenizer())
    llm.model.model.layers[0].self_attn.o_proj.weight = torch.nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(ModelError, match="no output projection"):
        llm.compress(TEXT, 0.3, method="kvzip-plus")


# ---- a scorer of one's own


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The file that docs/adding-a-method.md explains, and its one line of registry."""
    page = (Path(__file__).parents[1] / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert code is not None
    (tmp_path / "my_value_norm.py").write_text(code[1], encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(SCORERS, "value-norm", "my_value_norm:ValueNormScorer")
    return "value-norm"


def test_a_new_scorer_is_one_file(prefilled: kvzip.Prefilled, example: str) -> None:
    data = prefilled.compress(kvzip.CompressOptions(keep_ratio=0.3, method=f"{example}:power=2+uniform")).data
    assert data.info.method == "value-norm:power=2+uniform"
    full = prefilled._full
    for index, layer in enumerate(data.full_layers):
        norms = full.cache.layers[layer].values[0, :, data.prefix_len : full.length].norm(dim=-1)
        for head, row in enumerate(data.keep_mask[index]):
            assert norms[head][row].min() >= norms[head][~row].max()
    with pytest.raises(KVZipError, match="at least 0"):
        parse_method(f"{example}:power=-1")
    with pytest.raises(UnknownNameError, match="did you mean 'value-norm'"):
        parse_method("value-nrm")
