"""Methods by name, options and parts; every scorer against its slow, obvious form, every method by what must hold."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import Reference
from tiny import tiny_model, tiny_tokenizer

import kvzip
from kvzip.backends import get_backend
from kvzip.budget import BUDGET_KINDS
from kvzip.compress import Engine, FullContext, RepeatPrompts, chunk_slices
from kvzip.errors import BudgetError, InputError, KVZipError, ModelError, UnknownNameError
from kvzip.hf.geometry import probe
from kvzip.methods import ALIASES, all_options, parse_method, split_methods
from kvzip.ops.rope import shift_keys
from kvzip.ops.selection import PINNED
from kvzip.profilers import PROFILERS
from kvzip.scorers import SCORERS, get_scorer
from kvzip.scorers.base import NEEDS, Observation, Reading

FAMILIES = ["llama", "qwen2", "gemma3", "gemma2"]
PARSED = {name: parse_method(name) for name in ALIASES}
METHODS = [n for n, m in PARSED.items() if n != "kvzip-head" and m.scorer is not None and not m.decides_count]
PROMPTS = RepeatPrompts(torch.arange(3, 9), torch.arange(9, 14), torch.arange(14, 18))
TEXT = "The quick brown fox jumps over the lazy dog. " * 4
CLOSE = {"atol": 1e-4, "rtol": 1e-3}
PREFIX_LEN, CONTEXT_LEN = 7, 150


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_ids(seed: int, length: int) -> torch.Tensor:
    return torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(seed))


# ---- names


@pytest.mark.parametrize(
    ("name", "composition"),
    [
        ("snapkv", "window+uniform"),
        ("snapkv:window_size=64", "window:window_size=64+uniform"),
        ("snapkv:kernel_size=5, window_size = 64", "window:window_size=64,kernel_size=5+uniform"),
        ("snapkv:window_size=32", "window+uniform"),
        ("window+pyramid", "window+pyramid"),
        ("pyramidkv", "window:window_size=8+pyramid"),
        ("pyramidkv:window_size=32,beta=10", "window+pyramid:beta=10"),
        ("snapkv + pyramid:beta=1.50", "window+pyramid:beta=1.5"),
        ("adakv", "window+adakv"),
        ("adakv:alpha=0.5,window_size=16", "window:window_size=16+adakv:alpha=0.5"),
        ("kvzip+adakv:alpha=0", "reconstruction+adakv:alpha=0"),
        ("kvzip-plus", "reconstruction-plus+global"),
        ("expected-attention", "expected:epsilon=0.01+adakv"),
        ("expected-attention:epsilon=0", "expected+adakv"),
        ("h2o:reduce=max", "accumulated:reduce=max+uniform"),
        ("tova", "last-query+uniform"),
        ("l2-norm:skip_layers=12/0/1", "key-norm:skip_layers=0/1/12+uniform"),
        ("random:seed=7", "random:seed=7+global"),
        ("int4", "quantize"),
        ("k8v4", "quantize:key_bits=8,key_axis=token"),
        ("kvzip+int4", "reconstruction+global+quantize"),
        ("int4+kvzip", "reconstruction+global+quantize"),
        ("snapkv+int8+pyramid", "window+pyramid+quantize:key_bits=8,value_bits=8,key_axis=token"),
        ("int8+int4:group_size=32", "quantize:group_size=32"),
        ("quantize:key_bits=16,value_bits=2", "quantize:key_bits=16,value_bits=2"),
        ("refreekv", "suffix-loss+threshold"),
        ("baklava", "sinks-recent+baklava"),
        ("leankv", "mean-attention+threshold:threshold=0.02+levels"),
        ("kvzip+levels:high=1e30", "reconstruction+global+levels:high=1e30"),
        ("leankv:threshold=0.1,high=2", "mean-attention+threshold:threshold=0.1+levels:high=2"),
        ("kvzip+levels:high=0.5,low_key_bits=8", "reconstruction+global+levels:high=0.5,low_key_bits=8"),
        ("kvzip+baklava:gamma=0", "reconstruction+baklava:gamma=0"),
        ("duo-attention:num_sinks=8", "sinks-recent+duo:num_sinks=8"),
        ("kvzip+duo", "sinks-recent+duo"),
        ("refreekv:threshold=0.05,rule=paper", "suffix-loss:rule=paper+threshold:threshold=0.05"),
        ("clusterkv:skip_first=2,budget=512", "clusters:budget=512"),
        ("clusters+kvzip+uniform", "reconstruction+uniform+clusters"),
    ],
)
def test_a_name_with_options_has_one_canonical_form(name: str, composition: str) -> None:
    assert parse_method(name).composition == composition
    assert parse_method(composition).composition == composition


@given(st.sampled_from(sorted({*ALIASES, *SCORERS})), st.sampled_from(sorted(BUDGET_KINDS)), st.data())
def test_what_is_stored_is_read_as_the_same_method(name: str, budget: str, data: st.DataObject) -> None:
    values = {
        "window_size": st.integers(1, 99), "kernel_size": st.sampled_from([1, 3, 99]), "num_recent": st.integers(0, 99),
        "alpha": st.floats(0, 1), "beta": st.floats(1, 1e6), "epsilon": st.floats(0, 1), "seed": st.integers(0, 2**40),
        "reduce": st.sampled_from(["sum", "mean", "max"]), "pooling": st.sampled_from(["max", "avg"]),
        "num_sinks": st.integers(0, 9), "num_future": st.integers(1, 9), "skip_layers": st.just("0/2"),
        "gamma": st.floats(0, 9), "threshold": st.floats(-9, 9), "rule": st.sampled_from(["code", "paper"]),
        "key_bits": st.sampled_from([16, 8, 4, 2]), "value_bits": st.sampled_from([16, 8, 4, 2]),
        "key_axis": st.sampled_from(["token", "channel"]), "value_axis": st.sampled_from(["token", "channel"]),
        "group_size": st.integers(1, 99), "budget": st.integers(1, 99), "tokens_per_cluster": st.integers(1, 99),
        "skip_first": st.integers(0, 9), "iterations": st.integers(1, 99), "cache_steps": st.integers(0, 64),
        "whole_layers": st.integers(0, 9), "high": st.floats(-9, 9),
        **{f"{level}_{which}_bits": st.sampled_from([16, 8, 4, 2])
           for level in ("high", "low") for which in ("key", "value")},
    }  # fmt: skip
    given_options = {option: data.draw(values[option]) for option in all_options(name)}
    text = name + (":" + ",".join(f"{k}={v}" for k, v in given_options.items()) if given_options else "")
    scorer = "" if parse_method(text).scorer else "+window"
    own = "window" if name in BUDGET_KINDS else name  # beside others, adakv is the budget
    for whole in (text, f"{own}{scorer}+{budget}"):
        method = parse_method(whole)
        again = parse_method(method.composition)
        assert again == replace(method, name=again.name)
    method = parse_method(text)
    for option, value in [
        o for part in (method.scorer, method.budget, *method.transforms, method.fetch) if part for o in part.options
    ]:
        assert value == ((0, 2) if option == "skip_layers" else given_options[option])


def test_methods_joined_by_commas_keep_their_options() -> None:
    found = split_methods("h2o, snapkv:window_size=64,kernel_size=5+pyramid:beta=2,kvzip,")
    assert found == ("h2o", "snapkv:window_size=64,kernel_size=5+pyramid:beta=2", "kvzip")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("snapvk", "did you mean 'snapkv'"),
        ("snapkv:window_sise=3", "did you mean 'window_size'"),
        ("snapkv+pyramid:alpha=1", "known: beta"),
        ("kvzip:window_size=3", "takes no options"),
        ("pyramid", "no scorer"),
        ("levels:high=2", "has no scorer"),
        ("leankv+int4", "levels and quantize both decide the bits"),
        ("leankv:low_key_bits=3", "one of 16, 8, 4, 2"),
        ("leankv:high=nan", "a number"),
        ("window:", "write name:option=value"),
        ("window:window_size", "write name:option=value"),
        ("window:window_size=1,window_size=2", "each once"),
        ("snapkv:window_size=0", "a whole number, at least 1"),
        ("snapkv:window_size=1.5", "a whole number"),
        ("snapkv:kernel_size=4", "odd"),
        ("snapkv:pooling=mean", "one of max, avg"),
        ("adakv:alpha=1.1", "at most 1"),
        ("adakv:alpha=nan", "a number"),
        ("pyramidkv:beta=inf", "a number"),
        ("pyramidkv:beta=0.5", "at least 1"),
        ("l2-norm:skip_layers=-1", "at least 0"),
        ("l2-norm:skip_layers=a", "joined by /"),
    ],
)
def test_what_can_not_be_is_one_line_with_the_remedy(name: str, hint: str) -> None:
    with pytest.raises(InputError, match=re.escape(hint)) as caught:
        kvzip.CompressOptions(method=name)
    assert "\n" not in str(caught.value)


def test_every_scorer_declares_what_it_needs() -> None:
    for name in SCORERS:
        scorer = get_scorer(name, 3, 2, 100)
        assert scorer.needs <= set(NEEDS) and scorer.summary and scorer.source


# ---- scorers against slow forms


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> SimpleNamespace:
    model = tiny_model(request.param)
    engine = Engine(model, probe(model), get_backend(), PROMPTS)
    prefix, context = random_ids(0, PREFIX_LEN), random_ids(1, CONTEXT_LEN)
    full = FullContext(engine, prefix, context)
    full.prefill(block_len=64)
    geometry = engine.geometry
    layer = geometry.layers[geometry.full_layers[0]]
    about = geometry.full_layers, lambda i: geometry.layers[i].scale, layer.softcap
    with Reference(model) as reference:
        weights = reference.weights(torch.cat([prefix, context]), *about)
    return SimpleNamespace(
        family=request.param, model=model, engine=engine, prefix=prefix, context=context, full=full, about=about,
        weights=torch.stack([weights[i] for i in geometry.full_layers]),
        groups=layer.num_heads // layer.num_kv_heads,
    )  # fmt: skip


def by_group(case: SimpleNamespace, rows: torch.Tensor) -> torch.Tensor:
    """[Lf, Hq, ...] as [Lf, Hkv, G, ...]."""
    return rows.reshape(rows.shape[0], -1, case.groups, *rows.shape[2:])


@pytest.mark.parametrize(("size", "kernel", "pooling"), [(32, 7, "max"), (8, 5, "avg"), (1, 1, "max"), (100, 3, "max")])
def test_window_scores(case: SimpleNamespace, size: int, kernel: int, pooling: str) -> None:
    ours = case.full.score(f"window:window_size={size},kernel_size={kernel},pooling={pooling}")
    looked = by_group(case, case.weights[..., -size:, PREFIX_LEN:]).mean(dim=(2, 3))[..., : CONTEXT_LEN - size]
    around = torch.nn.functional.pad(looked, (kernel // 2, kernel // 2)).unfold(-1, kernel, 1)
    expected = around.amax(-1) if pooling == "max" else around.mean(-1)
    torch.testing.assert_close(ours[..., : CONTEXT_LEN - size], expected, **CLOSE)
    pinned = ours[..., CONTEXT_LEN - size :]
    assert pinned.min() >= PINNED and (pinned.diff(dim=-1) > 0).all()


def test_last_query_scores(case: SimpleNamespace) -> None:
    ours, expected = case.full.score("last-query"), case.weights[:, :, -1, PREFIX_LEN:].mean(dim=1)
    for head in range(ours.shape[1]):
        torch.testing.assert_close(ours[:, head, :-1], expected[:, :-1], **CLOSE)
    assert (ours[..., -1] >= PINNED).all()


@pytest.mark.parametrize("rule", ["code", "paper"])
@pytest.mark.parametrize("num_sinks", [4, PREFIX_LEN + 3])
def test_suffix_loss_scores(case: SimpleNamespace, rule: str, num_sinks: int) -> None:
    ours = case.full.score(f"suffix-loss:rule={rule},num_sinks={num_sinks},whole_layers=1")
    assert (ours[:1] >= PINNED).all()
    first = max(num_sinks, PREFIX_LEN)
    for layer in range(1, len(ours)):
        rows = case.weights[layer, :, -1].double()
        kept_before = [row[:first].square().sum() if rule == "paper" else 0 for row in rows]
        for position in range(first, PREFIX_LEN + CONTEXT_LEN):
            norms = [
                sum((row[start:].square().sum() + before) ** 0.5 for row, before in zip(rows, kept_before, strict=True))
                for start in (first, position + 1)
            ]
            got = ours[layer, :, position - PREFIX_LEN]
            if position < PREFIX_LEN + CONTEXT_LEN - 1:
                torch.testing.assert_close(got, (1 - norms[1] / norms[0]).float().expand(got.shape), **CLOSE)
            else:
                assert (got >= PINNED).all()
        assert (ours[layer, :, : first - PREFIX_LEN] >= PINNED).all()


@pytest.mark.parametrize("size", [5, 64, 999])
def test_mean_attention_scores(case: SimpleNamespace, size: int) -> None:
    ours = case.full.score(f"mean-attention:window_size={size}")
    last = min(size, CONTEXT_LEN)
    mean = case.weights[..., -last:, PREFIX_LEN:].mean(dim=2)  # each query head by itself
    expected = by_group(case, mean).amax(dim=2) * (PREFIX_LEN + CONTEXT_LEN)
    torch.testing.assert_close(ours[..., : CONTEXT_LEN - last], expected[..., : CONTEXT_LEN - last], **CLOSE)
    assert (ours[..., CONTEXT_LEN - last :] >= PINNED).all() and (ours > 0).all()


@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
def test_accumulated_scores(case: SimpleNamespace, reduce: str) -> None:
    ours = case.full.score(f"accumulated:reduce={reduce},num_recent=5")
    received = by_group(case, case.weights[..., PREFIX_LEN:, :])  # by the context's queries
    if reduce == "max":
        expected = received.amax(dim=(2, 3))
    else:
        expected = received.sum(dim=3).mean(dim=2)
        assert torch.allclose(expected.sum(-1), torch.tensor(float(CONTEXT_LEN)), rtol=1e-4)  # each row sums to 1
    expected = expected[..., PREFIX_LEN:]
    if reduce == "mean":
        expected = expected / torch.arange(CONTEXT_LEN, 0, -1)
    torch.testing.assert_close(ours[..., :-5], expected[..., :-5], **CLOSE)
    assert (ours[..., -5:] >= PINNED).all() and ours[..., :-5].max() < PINNED


def test_reconstruction_plus_scores(case: SimpleNamespace) -> None:
    ours = case.full.score("reconstruction-plus", 40)
    with Reference(case.model) as reference:
        replays = list(case.full._replays(chunk_slices(CONTEXT_LEN, 40)))
        expected = reference.plus_scores(case.prefix, case.context, replays, *case.about)
    torch.testing.assert_close(ours, expected, **CLOSE)
    assert not torch.allclose(ours, case.full.score("reconstruction", 40), rtol=0.1)


@pytest.mark.parametrize("epsilon", [0, 0.02])
def test_expected_scores(case: SimpleNamespace, epsilon: float) -> None:
    ours = case.full.score(f"expected:epsilon={epsilon},num_future=20")
    queries = unrotated_queries(case)
    for index, layer in enumerate(case.about[0]):
        geometry = case.engine.geometry.layers[layer]
        query = queries[layer][:, PREFIX_LEN:].double()  # the first four tokens are in the prefix
        mean = query.mean(dim=1)
        centred = query - mean.unsqueeze(1)
        covariance = centred.transpose(1, 2) @ centred / CONTEXT_LEN
        rotations = [rotation(geometry, PREFIX_LEN + CONTEXT_LEN + t) for t in range(20)]
        average = torch.stack(rotations).mean(dim=0)
        mean, covariance = mean @ average.T, average @ covariance @ average.T
        keys, values = (t[0].double() for t in case.full.cache.layers[layer].read(slice(PREFIX_LEN, None)))
        shares = []
        for head in range(geometry.num_heads):
            own = keys[head // case.groups]
            quadratic = torch.stack([k @ covariance[head] @ k for k in own])
            z = own @ mean[head] * geometry.scale + quadratic * geometry.scale**2 / 2
            shares.append(torch.softmax(z, dim=-1))
        share = torch.stack(shares).reshape(keys.shape[0], case.groups, -1).mean(dim=1)
        expected = (share + epsilon) * values.norm(dim=-1)
        torch.testing.assert_close(ours[index], expected.float(), **CLOSE)


def unrotated_queries(case: SimpleNamespace) -> dict[int, torch.Tensor]:
    """[Hq, T, D] a layer, from the projections themselves: what q_proj, or q_norm behind it, puts out."""
    seen, handles = {}, []
    for module in case.model.modules():
        if hasattr(module, "q_proj"):
            last = getattr(module, "q_norm", module.q_proj)
            keep = lambda _, __, out, m=module: seen.update({m.layer_idx: (out, m.head_dim)})  # noqa: E731
            handles.append(last.register_forward_hook(keep))
    with Reference(case.model), torch.inference_mode():
        case.model(torch.cat([case.prefix, case.context])[None])
    for handle in handles:
        handle.remove()
    return {
        layer: (out if out.dim() == 4 and out.shape[1] != PREFIX_LEN + CONTEXT_LEN else split_heads(out, size))[0]
        for layer, (out, size) in seen.items()
    }


def split_heads(out: torch.Tensor, head_dim: int) -> torch.Tensor:
    return out.reshape(1, out.shape[1], -1, head_dim).transpose(1, 2)


def rotation(geometry, position: int) -> torch.Tensor:
    """The matrix [D, D] that a rotary embedding is at that position."""
    half = len(geometry.inv_freq)
    matrix = torch.zeros(geometry.head_dim, geometry.head_dim, dtype=torch.float64)
    for i, frequency in enumerate(geometry.inv_freq.tolist()):
        angle = torch.tensor(position * frequency, dtype=torch.float64)
        matrix[i, i] = matrix[i + half, i + half] = angle.cos()
        matrix[i, i + half], matrix[i + half, i] = -angle.sin(), angle.sin()
    return matrix


WATCHING = [
    "window:window_size=70",
    "last-query",
    "accumulated",
    "accumulated:reduce=max",
    "accumulated:reduce=mean",
    "expected",
]


@pytest.mark.parametrize("name", WATCHING)
def test_watching_and_reading_again_see_the_same(case: SimpleNamespace, name: str) -> None:
    before = [(layer.keys.clone(), layer.values.clone(), layer.length) for layer in case.full.cache.layers]
    again = case.full.score(name)
    for layer, (keys, values, length) in zip(case.full.cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values) and layer.length == length
    for block_len in (1000, 64, 11):
        full = FullContext(case.engine, case.prefix, case.context)
        full.prefill(block_len, scorer_name=name)
        full.read_again = lambda *args, **kwargs: pytest.fail("read again")
        torch.testing.assert_close(full.score(name), again, **CLOSE)


def test_an_interrupted_second_reading_leaves_the_cache_as_it_was(case: SimpleNamespace) -> None:
    class Stop(Exception):
        pass

    def stop(*args: object) -> None:
        raise Stop

    before = case.full.score("accumulated")
    scorer = case.full.make_scorer("accumulated")
    scorer.watch = stop
    with pytest.raises(Stop):
        case.full.read_again(scorer)
    assert case.full.cache.length == PREFIX_LEN + CONTEXT_LEN
    torch.testing.assert_close(case.full.score("accumulated"), before)


# ---- scorers on made-up attention


def reading(query: torch.Tensor, keys: torch.Tensor, prefix_len: int, scale: float = 1.0) -> Reading:
    groups, num_keys, num_queries = query.shape[0] // keys.shape[0], keys.shape[1], query.shape[1]
    logits = query @ keys.repeat_interleave(groups, 0).transpose(1, 2) * scale
    past = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
    lse = torch.logsumexp(logits.masked_fill(~past, -torch.inf), dim=-1)
    inv_freq = 1.0 / 100 ** (torch.arange(0, keys.shape[2], 2) / keys.shape[2])
    return Reading(query, keys, lse, prefix_len, scale, None, inv_freq)


@pytest.mark.parametrize("pooling", ["max", "avg"])
def test_even_attention_has_even_window_scores_away_from_the_edges(pooling: str) -> None:
    scorer = get_scorer(f"window:window_size=1,kernel_size=5,pooling={pooling}", 1, 2, 40)
    scorer.watch(0, reading(torch.zeros(4, 1, 8), random(0, 2, 43, 8), 3))
    torch.testing.assert_close(scorer.scores()[0, :, 2:37], torch.full((2, 35), 1 / 43))


def test_identical_queries_have_no_covariance_and_one_rotation_is_exact() -> None:
    """With one future position n the score is the softmax of k . R_n q, q the query before rotation."""
    length, keys, values = 30, random(1, 1, 30, 8), random(2, 1, 30, 8)
    scorer = get_scorer("expected:num_future=1,num_sinks=0", 1, 1, length)
    about = reading(torch.zeros(1, length, 8), keys, 0, 0.4)
    turned = torch.cat([shift_keys(random(3, 1, 8), about.inv_freq, position) for position in range(length + 1)])
    scorer.watch(0, reading(turned[None, :length], keys, 0, 0.4))
    scorer.read(0, keys, values)
    expected = torch.softmax(keys[0] @ turned[length] * 0.4, dim=0) * values[0].norm(dim=-1)
    torch.testing.assert_close(scorer.scores()[0, 0], expected, **CLOSE)
    scorer.read(0, keys, 3 * values)
    torch.testing.assert_close(scorer.scores()[0, 0], 3 * expected, **CLOSE)


def test_gaussian_queries_pay_the_expected_attention() -> None:
    """The mean of exp(q . k scale) over many queries is exp(z), up to sampling."""
    length, keys, values = 20_000, 0.5 * random(1, 1, 20_000, 8), torch.ones(1, 20_000, 8)
    scorer = get_scorer("expected:num_future=1,num_sinks=0", 1, 1, length)
    plain = 0.3 + random(4, 1, length, 8)
    inv_freq = reading(plain[:, :1], keys, 0).inv_freq
    turned = torch.stack([shift_keys(plain[:, t], inv_freq, t) for t in range(length)], dim=1)
    scorer.watch(0, Reading(turned, keys, torch.zeros(1, length), 0, 0.5, None, inv_freq))
    scorer.read(0, keys, values)
    future = shift_keys(plain[0], inv_freq, length)
    sampled = torch.stack([torch.exp(future @ key * 0.5).mean() for key in keys[0, :50]])
    ours = scorer.scores()[0, 0, :50]
    torch.testing.assert_close(ours / ours.sum(), sampled / sampled.sum(), atol=0, rtol=0.03)


def test_unit_norms_make_kvzip_plus_kvzip() -> None:
    query, chunk, replayed = random(0, 4, 6, 8), random(1, 2, 10, 8), random(2, 2, 6, 8)
    values = torch.nn.functional.normalize(random(3, 2, 10, 8), dim=-1)
    logits = query @ torch.cat([chunk, replayed], 1).repeat_interleave(2, 0).transpose(1, 2)
    seen = Observation(
        query=query, prefix_keys=chunk[:, :0], chunk_keys=chunk, replay_keys=replayed,
        lse=torch.logsumexp(logits, -1), scale=1.0, softcap=None, chunk=slice(0, 10), chunk_values=values,
        input_norms=torch.ones(6), output_weights=torch.eye(8).expand(4, 8, 8),
    )  # fmt: skip
    plus, plain = get_scorer("reconstruction-plus", 1, 2, 10), get_scorer("reconstruction", 1, 2, 10)
    for scorer in (plus, plain):
        scorer.observe(0, seen)
    torch.testing.assert_close(plus.scores(), plain.scores())


def last_row(weights: list[list[float]], prefix_len: int = 1) -> Reading:
    """A last token that pays these weights, a list for each query head, each summing up to 1; one KV head."""
    keys = torch.eye(len(weights[0]))[None]
    query = torch.tensor(weights).log().clamp_min(-200)[:, None]  # exp(-200) is 0
    return Reading(query, keys, torch.zeros(len(weights), 1), prefix_len, 1.0, None, None)


def refreekv(options: str, about: Reading) -> list[bool]:
    """What is kept of the context in a layer that is not kept whole."""
    method = parse_method(f"refreekv:whole_layers=0,{options}")
    scorer = get_scorer(str(method.scorer), 1, 1, about.keys.shape[1] - about.prefix_len)
    scorer.watch(0, about)
    return method.budget_kind(scorer.scores(), None, dict(method.budget.options))[0, 0].tolist()


def test_refreekv_by_hand() -> None:
    """Two query heads behind a prefix of one token. Norms of the context: 5 and 13 parts of 100; of the last two
    pairs: 3 and 5. Without the first pair the mean norm falls from 9 to 4, by 5/9."""
    about = last_row([[0.93, 0.04, 0.0, 0.03], [0.83, 0.12, 0.0, 0.05]])
    assert refreekv("num_sinks=1,threshold=0.55", about) == [True, True, True]
    assert refreekv("num_sinks=1,threshold=0.56", about) == [False, False, True]


def test_refreekv_at_its_ends() -> None:
    some = last_row([[0.5, 0.1, 0.0, 0.1, 0.2, 0.1]])
    assert refreekv("num_sinks=1,threshold=0", some) == [True] * 5
    assert refreekv("num_sinks=1,threshold=0", last_row([[0.5, 0.0, 0.0, 0.2, 0.2, 0.1]])) == [False] * 2 + [True] * 3
    assert refreekv("num_sinks=1,threshold=1", some) == [False] * 4 + [True], "the last token"
    assert refreekv("num_sinks=3,threshold=1", some) == [True] * 2 + [False] * 2 + [True], "sinks and the last token"
    only = last_row([[0.0, 0.0, 1.0, 0.0, 0.0, 0.0]])
    assert refreekv("num_sinks=2,threshold=0.99", only) == [True] * 5, "all attention on the first that is no sink"
    assert refreekv("num_sinks=2", last_row([[1.0, 0.0, 0.0, 0.0, 0.0, 0.0]])) == [True] + [False] * 3 + [True]


def test_sinks_in_the_norm_let_nearly_everything_go() -> None:
    """1,000 tokens, 60% of the attention on 4 sinks and the rest flat: the toy of the specification."""
    about = last_row([[0.15] * 4 + [0.4 / 996] * 996], prefix_len=4)
    assert sum(refreekv("rule=paper", about)) == 1
    assert sum(refreekv("rule=code", about)) == 977


@given(st.integers(0, 2**16), st.sampled_from(["code", "paper"]))
def test_refreekv_keeps_sinks_and_a_suffix_and_never_more_at_a_higher_threshold(seed: int, rule: str) -> None:
    about = last_row(torch.softmax(2 * random(seed, 3, 40), dim=-1).tolist(), prefix_len=2)
    counts = []
    for threshold in (0, 0.01, 0.1, 0.5, 1):
        kept = refreekv(f"rule={rule},threshold={threshold}", about)
        assert kept[:2] == [True, True], "4 sinks, 2 of them in the prefix"
        cut = kept.index(True, 2)
        assert all(kept[cut:]) and not any(kept[2:cut])
        counts.append(sum(kept))
    assert counts == sorted(counts, reverse=True)


@given(st.integers(0, 2**16), st.floats(0.01, 100))
def test_scaling_all_keys_keeps_the_order_of_their_norms(seed: int, factor: float) -> None:
    keys = random(seed, 2, 30, 8).double()
    first, second = get_scorer("key-norm", 1, 2, 30), get_scorer("key-norm", 1, 2, 30)
    first.read(0, keys, keys)
    second.read(0, keys * factor, keys)
    torch.testing.assert_close(second.scores(), first.scores() * factor, atol=1e-6, rtol=1e-5)


# ---- what must hold for every method


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
