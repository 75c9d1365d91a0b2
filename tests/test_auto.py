"""What `keep_ratio="auto"` chooses: against a look at every candidate, on tiny and on real models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model, tiny_tokenizer

import kvzip
from kvzip.auto import Search
from kvzip.budget import Amounts, resolve_pairs
from kvzip.context import ContextInfo
from kvzip.errors import BudgetError, InputError
from kvzip.options import DEFAULT_MAX_LOSS, CompressOptions
from kvzip.recipes import FRONTIER, RECIPES, candidates

TEXT = "The quick brown fox jumps over the lazy dog and runs away from 17 angry bees. " * 12
AMOUNTS = Amounts(num_pairs=1000, fixed_nbytes=500, pair_nbytes=4, full_nbytes=8000)


@dataclass(frozen=True)
class FakeData:
    """Of a context, what a search looks at."""

    info: ContextInfo
    kv_nbytes: int
    context_len: int = 100


class Fake:
    """Compresses in no time: the bound of a candidate is told, a pair takes 4 bytes and 500 are always taken."""

    def __init__(self, bounds: dict[tuple[str, float], float]) -> None:
        self.bounds, self.asked = bounds, list[CompressOptions]()

    def __call__(self, options: CompressOptions) -> Any:
        self.asked.append(options)
        ratio = options.ratio or resolve_pairs(None, options.budget, AMOUNTS) / AMOUNTS.num_pairs
        loss = {"kl_bound": self.bounds.get((options.method, ratio), 0.5)}
        info = ContextInfo("m", "f", options.method, "float32", options.ratio, None, ratio, 4500, loss=loss)
        return kvzip.CompressedContext(None, FakeData(info, 500 + round(4000 * ratio)))  # type: ignore[arg-type]


def search(fake: Fake, **options: Any) -> Any:
    return Search(CompressOptions(**options), fake, lambda method: AMOUNTS).run().data


def rising(losses: list[float], method: str = "kvzip") -> Fake:
    """The smaller a candidate, the more it loses."""
    return Fake({(c.method, c.keep_ratio): loss for c, loss in zip(candidates(method), sorted(losses), strict=True)})


LOSSES = st.lists(st.floats(1e-6, 10), min_size=len(FRONTIER), max_size=len(FRONTIER))


@given(LOSSES, st.floats(1e-6, 10))
def test_the_smallest_within_the_loss(losses: list[float], limit: float) -> None:
    fake = rising(losses)
    fitting = [c for c in FRONTIER if fake.bounds[c.method, c.keep_ratio] <= limit]
    if not fitting:
        with pytest.raises(BudgetError, match=r"^max_loss .* can't be reached: .*; allow that much$"):
            search(fake, max_loss=limit)
        return
    found = search(fake, max_loss=limit)
    assert (found.info.method, found.info.keep_ratio) == (fitting[-1].method, fitting[-1].keep_ratio)
    assert found.info.chosen.startswith(str(fitting[-1])) and f"at most {limit:g}" in found.info.chosen
    assert len(fake.asked) <= 4, "halved, not tried one after another"


def test_losses_that_do_not_rise_never_give_one_above_the_limit() -> None:
    fake = Fake({(c.method, c.keep_ratio): (0.5 if i % 3 else 0.001) for i, c in enumerate(FRONTIER)})
    assert search(fake, max_loss=0.01).info.loss["kl_bound"] <= 0.01


@given(st.integers(1, 6000))
def test_the_largest_within_the_bytes(nbytes: int) -> None:
    fake = Fake({})
    if nbytes < 500 + 4 * round(1000 * FRONTIER[-1].keep_ratio):
        with pytest.raises(BudgetError, match=rf"^max_bytes {nbytes} is too small: .*, takes 900 bytes, 8.8x; allow"):
            search(fake, max_bytes=nbytes)
        return
    found = search(fake, max_bytes=nbytes)
    fitting = [c for c in FRONTIER if 500 + 4000 * c.keep_ratio <= nbytes]
    assert found.info.method == fitting[0].method
    assert found.kv_nbytes <= nbytes and (found.kv_nbytes > nbytes - 8 or found.info.keep_ratio == 1)
    assert f"within {nbytes}B" in found.info.chosen and len(fake.asked) == 1


def test_times_smaller_are_bytes_of_a_full_cache() -> None:
    fake = Fake({})
    found = search(fake, max_bytes="4x")
    assert 2000 - 8 < found.kv_nbytes <= 2000 and "within 4x" in found.info.chosen
    with pytest.raises(BudgetError, match=r"^max_bytes '20x' is too small: .*takes 900 bytes"):
        search(fake, max_bytes="20x")


def test_both_limits() -> None:
    losses = [0.001 * 2**i for i in range(len(FRONTIER))]
    assert search(rising(losses), max_loss=0.02, max_bytes=4000).info.loss["kl_bound"] <= 0.02
    with pytest.raises(BudgetError, match=r"can't both be: .* takes \d+ bytes .*within the bytes it loses up to 0\.5 "):
        search(rising(losses), max_loss=0.002, max_bytes=1520)
    with pytest.raises(BudgetError, match="none is as small as that; allow more bytes"):
        search(rising(losses), max_loss=0.002, max_bytes=600)


def test_another_method_is_searched_by_its_keep_ratios() -> None:
    fake = rising([0.01 * i for i in range(len(candidates("snapkv")))], "snapkv")
    found = search(fake, method="snapkv", keep_ratio="auto", max_loss=0.055)
    assert found.info.method == "snapkv" and found.info.keep_ratio == 0.5


def test_a_text_too_short_to_measure() -> None:
    """Refused before it is replayed; bytes alone need no certificate."""
    llm = kvzip.wrap(tiny_model("llama", seed=3), tiny_tokenizer())
    prefilled = llm.prefill("A short text.")
    with pytest.raises(BudgetError, match=r"^max_loss 0.05 can't be held: this text of \d+ tokens is too short"):
        prefilled.compress(CompressOptions(keep_ratio="auto"))
    assert not prefilled._scores
    full = prefilled.compress(1.0).data.kv_nbytes
    assert prefilled.compress(CompressOptions(max_bytes=full)).data.kv_nbytes == full
    assert prefilled.compress(CompressOptions(max_bytes=full // 2)).data.kv_nbytes <= full // 2


def test_the_frontier_falls_and_holds_the_recipes() -> None:
    named = [(recipe.composition, recipe.size.least) for recipe in RECIPES.values()]
    assert set(named) <= {(c.method, c.keep_ratio) for c in FRONTIER}
    assert len(set(FRONTIER)) == len(FRONTIER)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"keep_ratio": 0.3, "max_loss": 0.1}, BudgetError, r"keep_ratio 0.3 can't be asked beside max_loss"),
        ({"budget": 100, "max_bytes": 1000}, BudgetError, r"budget 100 can't be asked beside max_bytes"),
        ({"budget": 100, "keep_ratio": "auto"}, BudgetError, r"budget 100 can't be asked beside 'auto'"),
        ({"max_loss": 0}, BudgetError, r"max_loss 0 is out of range: give nats a token above 0"),
        ({"max_loss": float("nan")}, BudgetError, r"max_loss nan is out of range"),
        ({"max_bytes": "many"}, BudgetError, r"max_bytes 'many' is not an amount: give bytes as 64MiB"),
        ({"max_bytes": True}, BudgetError, r"is not an amount"),
        ({"budget": "many"}, BudgetError, r"budget 'many' is not an amount"),
        ({"budget": "0.5x"}, BudgetError, r"budget '0.5x' is out of range"),
        ({"max_loss": 0.1, "certify": False}, InputError, r"the search goes by the certificate"),
        ({"max_loss": 0.1, "faithful": True}, InputError, r"faithful can't be asked beside max_loss"),
        ({"max_loss": 0.1, "method": "int4"}, BudgetError, r"has no keep ratio to search for: take another method"),
        ({"max_loss": 0.1, "method": "refreekv"}, BudgetError, r"has no keep ratio to search for"),
        ({"max_loss": 0.1, "method": "kvzip+kvsharer"}, BudgetError, r"has no full cache to be measured against"),
        ({"keep_ratio": "automatic"}, BudgetError, r"keep ratio 'automatic' is out of range"),
    ],
)
def test_what_can_not_be_asked(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CompressOptions(**options)


def test_auto_alone_has_a_limit() -> None:
    assert CompressOptions(keep_ratio="auto").max_loss == DEFAULT_MAX_LOSS
    assert CompressOptions(max_bytes="64MiB").is_auto and CompressOptions(max_bytes="64MiB").max_loss is None


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_tiny_model_is_searched_with_one_replay(family: str) -> None:
    llm = kvzip.wrap(tiny_model(family, seed=3), tiny_tokenizer())
    stages: list[str] = []
    prefilled = llm.prefill(TEXT, progress=lambda stage, done, total: stages.append(stage))
    found = prefilled.compress(CompressOptions(max_loss=1e-4), progress=lambda stage, *_: stages.append(stage))
    loss = found.data.info.loss
    assert loss is not None and loss["kl_bound"] <= 1e-4 and found.data.info.chosen
    assert len(prefilled._scores) == 1 and len(prefilled._queries) == 1
    assert stages.count("prefill") and stages.count("score")
    again = llm.compress(TEXT, max_loss=1e-4)
    assert again.data.info.method == found.data.info.method and again.data.kv_nbytes == found.data.kv_nbytes
    limit = found.data.kv_nbytes * 3 // 4  # scales for 128 pairs take more than half of what so few pairs do
    small = llm.compress(TEXT, max_bytes=limit)
    assert small.data.kv_nbytes <= limit


@pytest.mark.real
def test_real_text_within_a_loss_and_within_bytes(llm: kvzip.LLM, articles: list[dict]) -> None:
    text = max(articles, key=lambda a: len(a["text"]))["text"][:3800]
    prefilled = llm.prefill(text)
    found = [prefilled.compress(CompressOptions(max_loss=limit)).data for limit in (0.01, 0.3)]
    for data, limit in zip(found, (0.01, 0.3), strict=True):
        assert data.info.loss is not None and data.info.loss["kl_bound"] <= limit
    assert found[1].kv_nbytes < found[0].kv_nbytes
    within = prefilled.compress(CompressOptions(max_bytes=found[1].kv_nbytes)).data
    assert within.kv_nbytes <= found[1].kv_nbytes
