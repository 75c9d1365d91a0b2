"""Methods by name, options and parts: one canonical form, and one line with the remedy for what can't be."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvzip
from kvzip.budget import BUDGET_KINDS
from kvzip.errors import InputError, UnknownNameError
from kvzip.methods import ALIASES, all_options, parse_method, split_methods
from kvzip.options import CompressOptions
from kvzip.recipes import RECIPES
from kvzip.scorers import SCORERS, get_scorer
from kvzip.scorers.base import NEEDS


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
        "key_bits": st.sampled_from([16, 8, 5, 3]), "value_bits": st.sampled_from([16, 6, 4, 2]),
        "key_axis": st.sampled_from(["token", "channel"]), "value_axis": st.sampled_from(["token", "channel"]),
        "group_size": st.integers(1, 99), "budget": st.integers(1, 99), "tokens_per_cluster": st.integers(1, 99),
        "skip_first": st.integers(0, 9), "iterations": st.integers(1, 99), "cache_steps": st.integers(0, 64),
        "whole_layers": st.integers(0, 9), "high": st.floats(-9, 9), "power": st.floats(0, 2),
        **{f"{level}_{which}_bits": st.sampled_from([16, 8, 4, 2])
           for level in ("high", "low") for which in ("key", "value")},
        "prefix_value_bits": st.sampled_from([16, 8, 4, 2]),
        "prefix_key_bits": st.sampled_from([16, 8, 4, 2]), "channels": st.sampled_from(["equal", "mixed"]),
        "values": st.sampled_from(["plain", "rotated"]),
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
        ("leankv:low_key_bits=7", "one of 16, 8, 6, 5, 4, 3, 2"),
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


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_its_composition_at_its_size(name: str) -> None:
    recipe, method = RECIPES[name], parse_method(name)
    assert method.composition == parse_method(recipe.composition).composition
    asked = CompressOptions(method=name)
    assert asked.keep_ratio is None and asked.size == recipe.size and asked.budget_text == str(recipe.size)
    other = CompressOptions(method=name, keep_ratio=0.6)
    assert other.keep_ratio == 0.6 and other.size is None, "what is asked for goes first"
    other = CompressOptions(method=name, budget="64MiB")
    assert other.keep_ratio is None and other.size is None and other.budget_text == "64MiB"
    changed = parse_method(f"{name}+uniform+int8")
    assert changed.budget is not None and changed.budget.name == "uniform"
    assert changed.size == recipe.size and "key_bits=8" in changed.composition


def test_recipes_keep_less_the_smaller_they_are() -> None:
    sizes = [RECIPES[f"kvzip:{size}"].size for size in ("safe", "small", "tiny")]
    assert sizes == sorted(sizes, key=lambda size: size.times) == sorted(sizes, key=lambda size: -size.least)


def test_a_recipe_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(UnknownNameError, match="unknown recipe 'kvzip:smal': did you mean 'kvzip:small'"):
        parse_method("kvzip:smal")
    with pytest.raises(UnknownNameError, match="kvzip takes no options"):
        parse_method("kvzip:size=small")
