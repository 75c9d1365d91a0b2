"""Profiles of a model: what calibration measures, how it is kept, and the budgets that divide by it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Reference
from tiny import tiny_model, tiny_tokenizer
from transformers import DynamicCache

import kvzip
from kvzip.compress import FullContext
from kvzip.errors import BudgetError, InputError, ModelError, UnknownNameError
from kvzip.methods import parse_method
from kvzip.ops import attention, selection
from kvzip.profilers import PROFILERS, BaklavaProfiler, DuoProfiler, Profiler
from kvzip.profiles import kind_needed, load_profile, profile_path, save_profile
from kvzip.scorers.base import NEEDS, Reading

TEXT = "The quick brown fox jumps over the lazy dog. " * 8
SEEDS = st.integers(0, 2**16)
CLOSE = {"atol": 1e-4, "rtol": 1e-3}


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma3", "gemma2"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[kvzip.LLM]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVZIP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield kvzip.wrap(tiny_model(request.param, seed=3), tiny_tokenizer())


def measured(llm: kvzip.LLM, kind: str) -> dict[str, torch.Tensor]:
    llm.calibrate(kind, TEXT, "a test")
    return dict(load_profile(kind, llm.fingerprint, llm.geometry.full_shape))


# ---- what is measured, against slow forms


@torch.inference_mode()
def attention_of(llm: kvzip.LLM, ids: torch.Tensor) -> tuple[dict, dict, dict, dict]:
    """By full-attention layer: weights [Hq, T, T], values [Hkv, T, D], input of the layer and output of its attention."""
    layers, model = llm.geometry.full_layers, llm.model
    entering, added = {}, {}
    handles = []
    for index in layers:
        block = model.model.layers[index]
        keep = lambda _, args, out, index=index: added.update({index: out[0][0]})  # noqa: E731
        handles.append(block.self_attn.register_forward_hook(keep))
    with Reference(model) as reference:
        softcap = llm.geometry.layers[layers[0]].softcap
        weights = reference.weights(ids, layers, lambda i: llm.geometry.layers[i].scale, softcap)
        cache = DynamicCache()
        hidden = model(ids[None], past_key_values=cache, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    entering = {index: hidden[index][0] for index in layers}
    return weights, {index: cache.layers[index].values[0] for index in layers}, entering, added


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def test_importance_is_how_much_attention_changes(llm: kvzip.LLM) -> None:
    found = measured(llm, "baklava")
    ids = torch.cat([torch.tensor(llm.prefix_ids()), llm.tokenize(TEXT)])
    first, groups = len(llm.prefix_ids()), llm.geometry.layers[0].num_heads // llm.geometry.full_shape[1]
    weights, values, entering, added = attention_of(llm, ids)
    for row, layer in enumerate(llm.geometry.full_layers):
        for head in range(llm.geometry.full_shape[1]):
            changes = []
            for query_head in range(head * groups, (head + 1) * groups):
                out = weights[layer][query_head] @ values[layer][head]
                changes += [1 - cosine(values[layer][head][t], out[t]) for t in range(first, len(ids))]
            assert found["head_importance"][row, head] == pytest.approx(sum(changes) / len(changes), rel=1e-3)
        x, a = entering[layer], added[layer]
        changes = [1 - cosine(x[t], x[t] + a[t]) for t in range(first, len(ids))]
        assert found["layer_importance"][row] == pytest.approx(sum(changes) / len(changes), rel=1e-3)


def test_retrieval_is_attention_beyond_sinks_and_recent_tokens(llm: kvzip.LLM) -> None:
    found = measured(llm, "duo")["retrieval_scores"]
    passage = DuoProfiler.passage(llm.tokenize(TEXT))
    half = len(passage) // 2
    assert torch.equal(passage[:half], passage[half:]) and half == len(llm.tokenize(TEXT))
    assert torch.equal(passage[:half].sort().values, llm.tokenize(TEXT).sort().values)
    assert not torch.equal(passage[:half], llm.tokenize(TEXT))
    prefix = llm.prefix_ids()
    ids = torch.cat([torch.tensor(prefix), passage])
    weights = attention_of(llm, ids)[0]
    for row, layer in enumerate(llm.geometry.full_layers):
        by_query_head = torch.zeros(len(weights[layer]))
        for t in range(len(prefix) + half, len(ids)):
            by_query_head += weights[layer][:, t, len(prefix) + 64 : t - 256 + 1].sum(-1) / half
        expected = by_query_head.reshape(llm.geometry.full_shape[1], -1).mean(-1)
        torch.testing.assert_close(found[row], expected, **CLOSE)


def test_a_heads_score_is_the_largest_of_its_pairs(llm: kvzip.LLM) -> None:
    expected = llm.prefill(TEXT).scores(parse_method("kvzip")).amax(dim=-1)
    torch.testing.assert_close(measured(llm, "head")["head_scores"], expected)


def test_a_head_that_looks_at_itself_alone_changes_nothing() -> None:
    profiler, values = BaklavaProfiler((1, 2, 5)), random(0, 2, 5, 4)
    out = torch.stack([values[0], values[0], -values[1], values[1]])
    profiler.watch(0, Reading(
        query=out, keys=values, lse=torch.zeros(4, 5), prefix_len=0, scale=1.0, softcap=None, inv_freq=None,
        values=values, outputs=out, stream=torch.ones(5, 3), output_weights=torch.zeros(4, 4, 3),
    ))  # fmt: skip
    found = profiler.profile()
    torch.testing.assert_close(found["head_importance"], torch.tensor([[0.0, 1.0]]))
    torch.testing.assert_close(found["layer_importance"], torch.tensor([0.0]))


@settings(deadline=None)
@given(SEEDS, st.integers(1, 9), st.integers(0, 9), st.integers(0, 12), st.integers(0, 12), st.integers(1, 60))
def test_mass_between(seed: int, q_len: int, before: int, first: int, num_recent: int, block: int) -> None:
    query, keys = random(seed, 4, q_len, 8), random(seed + 1, 2, before + q_len, 8)
    logits = query @ keys.repeat_interleave(2, 0).transpose(1, 2) * 0.4
    future = torch.ones(q_len, before + q_len, dtype=torch.bool).triu(before + 1)
    weights = torch.softmax(logits.masked_fill(future, -torch.inf), dim=-1)
    lse = torch.logsumexp(logits.masked_fill(future, -torch.inf), dim=-1)
    found = attention.mass_between(query, keys, lse, first, num_recent, scale=0.4, block_logits=block)
    for head in range(4):
        for t in range(q_len):
            expected = sum(weights[head, t, i] for i in range(first, max(first, before + t + 1 - num_recent)))
            assert found[head, t] == pytest.approx(float(expected), abs=1e-5)


# ---- how it is kept


@pytest.mark.parametrize(("kind", "method"), [("head", "kvzip-head"), ("baklava", "baklava"), ("duo", "duo-attention")])
def test_a_missing_profile_names_the_command_that_makes_it(
    kind: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVZIP_CACHE", str(tmp_path))
    llm = kvzip.wrap(tiny_model("qwen2", seed=3), tiny_tokenizer())
    prefilled = llm.prefill(TEXT)
    read = FullContext.prefill
    monkeypatch.setattr(FullContext, "prefill", lambda *args, **kwargs: pytest.fail("read"))
    options = kvzip.CompressOptions(keep_ratio=0.5, method=method)
    for refused in (lambda: llm.compress(TEXT, 0.5, method=method), lambda: prefilled.compress(options)):
        with pytest.raises(ModelError, match=f"kvzip calibrate --method {kind} -m MODEL") as caught:
            refused()
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(FullContext, "prefill", read)
    assert llm.compress(TEXT, 1.0, method=method).data.keep_mask.all(), "nothing to choose"
    path = llm.calibrate(kind, TEXT, "a test")
    assert llm.compress(TEXT, 0.5, method=method).data.info.method == parse_method(method).composition
    content = json.loads(path.read_text())
    assert content["fingerprint"] == llm.fingerprint and content["source"] == "a test"
    name = next(iter(PROFILERS[kind].values))
    for change in ({name: [[1, 2]]}, {"fingerprint": "other"}, {name: [[float("nan")] * 2] * 3}, {name: [[-1, 1]] * 3}):
        path.write_text(json.dumps(content | change))
        with pytest.raises(ModelError, match=r"does not fit this model.*calibrate"):
            llm.compress(TEXT, 0.5, method=method)
    for text in ("not json", "{}", json.dumps(content | {name: "x"})):
        path.write_text(text)
        with pytest.raises(ModelError, match=r"can't be read.*calibrate"):
            llm.compress(TEXT, 0.5, method=method)


def test_a_head_profile_of_an_older_version_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVZIP_CACHE", str(tmp_path))
    path = tmp_path / "head-profiles" / "kvzip-1-abc.json"
    path.parent.mkdir()
    path.write_text('{"fingerprint": "kvzip-1:abc", "source": "t", "head_scores": [[0.5, 0.25]]}')
    assert profile_path("head", "kvzip-1:abc") == path
    assert load_profile("head", "kvzip-1:abc", (1, 2))["head_scores"].tolist() == [[0.5, 0.25]]


@settings(deadline=None, max_examples=20)
@given(SEEDS)
def test_what_is_saved_is_read_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVZIP_CACHE", str(tmp_path_factory.mktemp("cache")))
        profile = {"head_importance": random(seed, 3, 2).abs(), "layer_importance": random(seed + 1, 3).abs()}
        save_profile("baklava", "a:b", profile, "")
        again = load_profile("baklava", "a:b", (3, 2))
        assert all(torch.equal(again[name], value) for name, value in profile.items())


def test_every_kind_is_a_need_and_every_profiler_says_what_it_measures() -> None:
    for kind, profiler in PROFILERS.items():
        assert kind_needed(frozenset({f"{kind}_profile", "keys"})) == kind and f"{kind}_profile" in NEEDS
        assert profiler.needs <= set(NEEDS) and issubclass(profiler, Profiler) and profiler.values
    assert kind_needed(frozenset({"keys"})) is None


def test_texts_that_do_not_do_are_refused(llm: kvzip.LLM) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'duo'"):
        llm.calibrate("due", TEXT)
    with pytest.raises(InputError, match="give a text of at least one word"):
        llm.calibrate("head", " ")
    with pytest.raises(InputError, match="give more than 320"):
        llm.calibrate("duo", TEXT[:320])


# ---- the budgets


@given(
    st.lists(st.one_of(st.floats(0, 10), st.just(0.0)), min_size=1, max_size=12), st.integers(0, 40), st.floats(0, 1)
)
def test_proportional_counts(weights: list[float], capacity: int, share: float) -> None:
    total = round(share * capacity * len(weights))
    counts = selection.proportional_counts(total, weights, capacity)
    assert sum(counts) == total and all(0 <= count <= capacity for count in counts)
    for a, count in zip(weights, counts, strict=True):
        assert all(count <= other for b, other in zip(weights, counts, strict=True) if b > 1.001 * a + 1e-9)
    if not any(weights) or len(set(weights)) == 1:
        assert max(counts) - min(counts) <= 1


def test_proportional_counts_by_hand() -> None:
    assert selection.proportional_counts(12, [1, 2, 3], 100) == [2, 4, 6]
    assert selection.proportional_counts(12, [1, 2, 3], 5) == [2, 5, 5], "3 gives 1 of its 6: 2 1/3, 4 2/3"
    assert selection.proportional_counts(7, [1, 1, 1], 9) == [3, 2, 2]
    assert selection.proportional_counts(6, [0, 1, 0], 4) == [1, 4, 1], "what is over goes even to heads without weight"
    assert selection.proportional_counts(3, [0, 0, 0, 0], 9) == [1, 1, 1, 0]


def baklava(heads: list[list[float]], layers: list[float]) -> dict[str, torch.Tensor]:
    return {"head_importance": torch.tensor(heads), "layer_importance": torch.tensor(layers)}


@given(SEEDS, st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.data())
def test_equal_importances_are_uniform(seed: int, layers: int, heads: int, length: int, data: st.DataObject) -> None:
    scores = random(seed, layers, heads, length)
    budget = data.draw(st.integers(0, scores.numel()))
    same = baklava([[0.3] * heads] * layers, [0.2] * layers)
    assert torch.equal(selection.select_baklava(scores, budget, same), selection.select_uniform(scores, budget))


def test_sizes_follow_heads_and_layers() -> None:
    profile, scores = baklava([[0.4, 0.2], [0.4, 0.0]], [0.1, 0.2]), random(0, 2, 2, 1000)
    plain = selection.select_baklava(scores, 1000, profile, gamma=0).sum(-1)
    assert plain.tolist() == [[400, 200], [400, 0]]
    raised = selection.select_baklava(scores, 1250, profile, gamma=1).sum(-1)  # weights 1.5, 0.75; 2, 0
    assert raised.tolist() == [[441, 221], [588, 0]]
    mask = selection.select_baklava(scores, 1000, profile, gamma=0)
    for layer in range(2):
        for head, row in enumerate(mask[layer]):
            if row.any():
                assert scores[layer, head][row].min() >= scores[layer, head][~row].max()


def test_sizes_do_not_depend_on_the_text(llm: kvzip.LLM) -> None:
    measured(llm, "baklava")
    size = len(llm.tokenize(TEXT))
    texts = (TEXT, TEXT[::-1])
    found = [llm.compress(text, 0.3, method=m).data.keep_mask for text in texts for m in ("baklava", "kvzip+baklava")]
    counts = found[0].sum(-1)
    assert counts.sum() == round(0.3 * found[0].numel()) and counts.max() > counts.min() and counts.max() <= size
    assert all(torch.equal(mask.sum(-1), counts) for mask in found)
    assert found[0][..., :4].all() or counts.min() < 4
    assert not torch.equal(found[0], found[1])


def test_layers_that_are_pinned_leave_the_profile_of_the_others(llm: kvzip.LLM) -> None:
    profile = measured(llm, "baklava")
    data = llm.compress(TEXT, 0.7, method="l2-norm:skip_layers=0+baklava").data
    assert data.keep_mask[0].all() and data.keep_mask.sum() == round(0.7 * data.keep_mask.numel())
    others = {name: value[1:] for name, value in profile.items()}
    rest = int(data.keep_mask[1:].sum())
    scores = llm.prefill(TEXT).scores(parse_method("l2-norm"))[1:]
    assert torch.equal(data.keep_mask[1:], selection.select_baklava(scores, rest, others))


def duo(budget: int, length: int, scores: list[list[float]], **options: int) -> list[list[str]]:
    shape = torch.zeros(len(scores), len(scores[0]), length)
    mask = selection.select_duo(shape, budget, {"retrieval_scores": torch.tensor(scores)}, **options)
    assert mask.sum() == budget
    return [["".join(".x"[int(kept)] for kept in head) for head in layer] for layer in mask]


def test_duo_by_hand() -> None:
    heads, sizes = [[0.1, 0.9], [0.5, 0.2]], {"num_sinks": 1, "num_recent": 2}
    stream = "x.....xx"
    assert duo(12, 8, heads, **sizes) == [[stream, stream], [stream, stream]]
    assert duo(22, 8, heads, **sizes) == [[stream, "xxxxxxxx"], ["xxxxxxxx", stream]]
    assert duo(25, 8, heads, **sizes) == [[stream, "xxxxxxxx"], ["xxxxxxxx", "x..xxxxx"]], (
        "the next one gets what is left"
    )
    assert duo(32, 8, heads, **sizes) == [["xxxxxxxx"] * 2] * 2


def test_duo_below_streaming_heads_shortens_them_evenly() -> None:
    heads = [[0.1, 0.9], [0.5, 0.2]]
    found = duo(9, 8, heads, num_sinks=2, num_recent=2)
    assert found == [["x.....xx", "x......x"], ["x......x", "x......x"]]
    assert duo(6, 8, heads, num_sinks=64, num_recent=256) == [["......xx", "......xx"], [".......x", ".......x"]]


@given(SEEDS, st.integers(1, 3), st.integers(1, 3), st.integers(1, 30), st.integers(0, 5), st.integers(0, 9), st.data())
def test_duo_is_exact_and_as_large_as_its_retrieval_heads(
    seed: int, layers: int, heads: int, length: int, num_sinks: int, num_recent: int, data: st.DataObject
) -> None:
    profile = {"retrieval_scores": random(seed, layers, heads).abs()}
    scores, options = torch.zeros(layers, heads, length), {"num_sinks": num_sinks, "num_recent": num_recent}
    budget = data.draw(st.integers(0, scores.numel()))
    assert selection.select_duo(scores, budget, profile, **options).sum() == budget
    streaming, retrieval = min(length, num_sinks + num_recent), data.draw(st.integers(0, layers * heads))
    whole = retrieval * length + (layers * heads - retrieval) * streaming
    mask = selection.select_duo(scores, whole, profile, **options)
    ratio = 1 - (1 - retrieval / (layers * heads)) * (1 - streaming / length)
    assert float(mask.float().mean()) == pytest.approx(ratio)
    if streaming < length:
        full = mask.all(dim=-1)
        assert full.sum() == retrieval
        others = mask[~full]
        assert (others == others[:1]).all(), "streaming heads are all alike"
        order = profile["retrieval_scores"]
        assert not full.any() or full.all() or order[full].min() > order[~full].max()


def test_a_budget_without_room_is_refused_as_elsewhere() -> None:
    with pytest.raises(BudgetError, match="out of range"):
        selection.select_counts(torch.zeros(1, 1, 3), torch.tensor([[4]]))
