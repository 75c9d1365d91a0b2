"""The measured loss: against a slow oracle on every family, what it costs, and that it changes nothing."""

from __future__ import annotations

import random
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from reference import Reference
from test_families import NOISE, PROMPTS, evicted_of, random_ids
from tiny import CONFIGS, SMALL, llama, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

import kvzip
from kvzip import certificate
from kvzip.backends import get_backend
from kvzip.certificate import (
    ANSWER_LEN,
    EFFICIENCY,
    MAX_QUESTIONS,
    MAX_SPANS,
    MIN_QUESTIONS,
    MIN_SPANS,
    OPENING_LEN,
    QUOTE_LEN,
    SPAN_LEN,
    Certifier,
    make_probe,
    probe_size,
    upper_bound,
)
from kvzip.chunks import MIN_REPLAY_LEN, Asking
from kvzip.compress import Engine, FullContext
from kvzip.context import LOSS_RANGES, RaggedContext
from kvzip.errors import InputError
from kvzip.hf.geometry import probe
from kvzip.hf.head import SOFTMAX_COST, head_cost, log_probs
from kvzip.ops.ragged import pack_bits
from kvzip.sharing import save_shared_layers

RNG = random.Random(0)
WORDS = ["the quick", "brown", "fox jumps", "over a", "lazy dog", "while", "nobody"]
TEXT = " ".join(RNG.choice(WORDS) for _ in range(200))


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def case(request: pytest.FixtureRequest) -> SimpleNamespace:
    model = tiny_model(request.param)
    engine = Engine(model, probe(model), get_backend(), PROMPTS)
    full = FullContext(engine, random_ids(0, 7), random_ids(1, 1000))
    full.prefill()
    shape = (len(engine.geometry.full_layers), 2, 1000)
    chance = torch.rand(shape, generator=torch.Generator().manual_seed(7))
    return SimpleNamespace(
        model=model, engine=engine, full=full, chance=chance, prefix=full.prefix_ids, certifier=Certifier(full)
    )


def context_of(case: SimpleNamespace, mask: torch.Tensor) -> RaggedContext:
    ids = case.full.prefix_ids.int(), case.full.context_ids.int()
    return RaggedContext(case.full.evict(mask), *ids, pack_bits(mask), None, None)


def test_it_is_what_masks_over_one_forward_pass_give(case: SimpleNamespace) -> None:
    mask, asked = case.chance < 0.3, case.certifier.probe
    loss = case.certifier.certify(context_of(case, mask))
    whole = torch.cat([case.full.prefix_ids, case.full.context_ids, asked.ids])
    with Reference(case.model) as reference:
        found = [
            torch.log_softmax(reference.logits(whole, len(asked.ids), evicted, case.full.length), -1)[asked.asked]
            for evicted in ({}, evicted_of(case, mask))
        ]
    kl = torch.nn.functional.kl_div(found[1], found[0], log_target=True, reduction="none").sum(-1)
    best = [f.argmax(-1) for f in found]
    assert kl.mean() > 0.002, "the mask matters, so the comparison can fail"
    assert loss["kl"] == pytest.approx(
        float(kl.mean()), rel=2e-2, abs=1e-5
    )  # float32 noise of logits of about 10, as NOISE
    assert loss["agreement"] == pytest.approx(float((best[0] == best[1]).float().mean()), abs=1.5 / len(kl))
    assert loss["repeated_full"] == pytest.approx(float((best[0] == asked.expected).float().mean()), abs=1.5 / len(kl))
    assert loss["repeated"] == pytest.approx(float((best[1] == asked.expected).float().mean()), abs=1.5 / len(kl))


def test_keeping_everything_loses_nothing(case: SimpleNamespace) -> None:
    loss = case.certifier.certify(context_of(case, torch.ones_like(case.chance, dtype=torch.bool)))
    assert loss["agreement"] == 1 and loss["repeated"] == loss["repeated_full"]
    assert 0 <= loss["kl"] <= loss["kl_bound"] < 1e-4  # float32 noise: rotated keys are summed in another order


def test_the_more_is_evicted_the_more_is_lost(case: SimpleNamespace) -> None:
    kl = [case.certifier.certify(context_of(case, case.chance < share))["kl"] for share in (0.98, 0.7, 0.1)]
    assert kl == sorted(kl) and kl[0] > 0


def test_one_pass_over_both_caches_says_what_a_pass_over_each_does(case: SimpleNamespace) -> None:
    context, alone = context_of(case, case.chance < 0.3), Certifier(case.full)
    together = case.certifier.certify(context)
    alone.ask_full()
    assert alone.let_go() and not case.certifier.let_go()
    found = alone.certify(context)
    assert found["kl"] == pytest.approx(together["kl"], rel=1e-3, abs=1e-6)  # float32 noise: other shapes of products
    assert found["kl_bound"] == pytest.approx(together["kl_bound"], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("how", ["ask_full", "certify"])
def test_asking_the_full_cache_leaves_nothing_behind(case: SimpleNamespace, how: str) -> None:
    before = [(layer.keys.clone(), layer.length) for layer in case.full.cache.stored.values()]
    certifier, context = Certifier(case.full), context_of(case, case.chance < 0.3)
    certifier.ask_full() if how == "ask_full" else certifier.certify(context)
    for layer, (keys, length) in zip(case.full.cache.stored.values(), before, strict=True):
        assert torch.equal(layer.keys, keys) and layer.length == length and layer.replay is None


def test_the_head_is_the_models_own(case: SimpleNamespace) -> None:
    ids = random_ids(3, 20)[None]
    with torch.inference_mode():
        hidden = case.model.get_decoder()(ids).last_hidden_state[0]
        expected = torch.log_softmax(case.model(ids).logits[0], -1)
        torch.testing.assert_close(log_probs(case.model, hidden), expected, **NOISE)


def test_a_soft_cap_of_the_logits_is_applied() -> None:
    model, hidden = tiny_model("gemma2"), torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    assert model.config.final_logit_softcapping
    plain = torch.log_softmax(model.lm_head(hidden), -1)
    assert (log_probs(model, hidden) - plain).abs().max() > 0.01


def test_a_probe_is_made_of_the_text_alone_and_is_the_same_each_time() -> None:
    ids, before = torch.randperm(5000)[:900], torch.arange(5)
    found, again = make_probe(before, ids, 6), make_probe(before, ids.clone(), 6)
    assert torch.equal(found.ids, again.ids)
    assert torch.equal(found.ids[:5], before) and len(found.ids) == 5 + 6 * SPAN_LEN
    places = [int((ids == token).nonzero()) for token in found.ids[5::SPAN_LEN]]
    for span, place in zip(found.ids[5:].split(SPAN_LEN), places, strict=True):
        assert torch.equal(span, ids[place : place + SPAN_LEN])
    strata = sorted(place * 6 // (900 - SPAN_LEN + 1) for place in places)
    assert strata == list(range(6)), "one from each sixth of the text"
    assert torch.equal(found.ids[found.asked + 1], found.expected)
    assert len(found.expected) == 6 * (SPAN_LEN - OPENING_LEN) and found.item_of.bincount().unique().numel() == 1
    other = make_probe(before, ids.flip(0), 6)
    assert not torch.equal(other.ids, found.ids)


def test_questions_quote_the_text_and_expect_what_follows() -> None:
    ids, before = torch.arange(10, 910), torch.arange(5)
    asking = Asking(torch.tensor([1001, 1002]), torch.tensor([1003]))
    found, plain = make_probe(before, ids, 6, asking, 3), make_probe(before, ids, 6)
    own = slice(len(plain.ids), None)
    assert torch.equal(found.ids[: own.start], plain.ids) and found.num_questions == 3 and plain.num_questions == 0
    turns = found.ids[own].split(2 + QUOTE_LEN + 1 + ANSWER_LEN)
    strata = []
    for turn, expected in zip(turns, found.expected[len(plain.expected) :].split(ANSWER_LEN), strict=True):
        quote, answer = turn[2 : 2 + QUOTE_LEN], turn[-ANSWER_LEN:]
        assert turn[:2].tolist() == [1001, 1002] and int(turn[-ANSWER_LEN - 1]) == 1003
        assert torch.equal(torch.cat([quote, answer]), torch.arange(int(quote[0]), int(answer[-1]) + 1)), "in one run"
        assert torch.equal(answer, expected)
        strata.append((int(quote[0]) - 10) * 3 // (900 - QUOTE_LEN - ANSWER_LEN + 1))
    assert sorted(strata) == [0, 1, 2], "one from each third of the text"
    assert torch.equal(found.ids[found.asked + 1], found.expected)
    assert found.item_of[len(plain.expected) :].tolist() == [6] * ANSWER_LEN + [7] * ANSWER_LEN + [8] * ANSWER_LEN


def test_its_length_is_held_to_a_share_of_the_prefill() -> None:
    model, endless = llama(), float("inf")
    vocab, body = 300 * (64 + SOFTMAX_COST), sum(p.numel() for p in model.model.parameters()) - 300 * 64
    assert head_cost(model) == pytest.approx(vocab / body)
    most = 0
    for head in (0.1, 0.4, 2.5):
        for length in (300, 700, 2000, 9000):
            for asking_len in (None, 18):
                spans, questions = probe_size(length, 14, endless, head, asking_len)
                tokens = 14 + spans * SPAN_LEN + questions * ((asking_len or 0) + QUOTE_LEN + ANSWER_LEN)
                compared = spans * (SPAN_LEN - OPENING_LEN) + questions * ANSWER_LEN
                spent = tokens / EFFICIENCY + compared * head
                assert 0 <= spans <= MAX_SPANS and (not spans or 2 * spent <= 0.25 * length)
                assert questions == 0 or (
                    asking_len and MIN_QUESTIONS <= questions <= MAX_QUESTIONS and spans >= MIN_SPANS
                )
                most = max(most, questions)
                assert probe_size(length, 14, 14 + 100, head, asking_len)[0] * SPAN_LEN <= 100
    assert most == MAX_QUESTIONS
    assert probe_size(10**6, 14, endless, 0.4) == (MAX_SPANS, 0)
    assert probe_size(10**6, 14, endless, 0.4, 18) == (MAX_SPANS, MAX_QUESTIONS)
    assert probe_size(10**6, 14, 14 + 3 * SPAN_LEN, 0.4, 18) == (3, 0), "the model's positions"
    assert probe_size(10**6, 14, 10, 0.4)[0] == probe_size(50, 14, endless, 0.4, 18)[0] == 0
    assert probe_size(10**6, 14, endless, endless)[0] == 0, "a head that can't be counted"


def test_the_bound_is_students() -> None:
    assert upper_bound([1.0, 2.0, 3.0]) == pytest.approx(2 + 2.920 / 3**0.5)
    assert upper_bound([0.5, 0.5]) == 0.5
    rng = random.Random(0)
    covered = [upper_bound([rng.gauss(0, 1) for _ in range(5)]) >= 0 for _ in range(4000)]
    assert statistics.mean(map(float, covered)) == pytest.approx(0.95, abs=0.015)
    assert len(certificate.T_QUANTILES) == MAX_SPANS + MAX_QUESTIONS - 1


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> kvzip.LLM:
    monkeypatch.setenv("KVZIP_CACHE", str(tmp_path / "cache"))
    return kvzip.wrap(llama(), tiny_tokenizer())


def test_every_context_has_one_and_its_file_too(tiny: kvzip.LLM, tmp_path: Path) -> None:
    context = tiny.compress(TEXT, 0.3)
    loss = context.stats["loss"]
    assert loss.keys() == LOSS_RANGES.keys() - {"kl_questions"} and loss["questions"] == 0
    assert all(LOSS_RANGES[k][0] <= value <= LOSS_RANGES[k][1] for k, value in loss.items())
    assert loss["tokens"] == loss["spans"] * (SPAN_LEN - OPENING_LEN) and 0 < loss["kl"] <= loss["kl_bound"]
    assert context.data.info.total_s > loss["seconds"] > 0
    context.save(tmp_path / "a.kvz")
    assert tiny.open(tmp_path / "a.kvz").stats["loss"] == loss


def test_a_long_text_is_asked_about_too(tmp_path: Path) -> None:
    config = LlamaConfig(**SMALL | {"max_position_embeddings": 1 << 15})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tiny = kvzip.wrap(model, tiny_tokenizer())
    context = tiny.compress(" ".join([TEXT] * 6), 0.3)
    loss = context.stats["loss"]
    assert loss["questions"] >= MIN_QUESTIONS and loss["spans"] > loss["questions"]
    assert loss["tokens"] == 6 * (loss["spans"] + loss["questions"]) and loss["kl_questions"] > 0
    spans = (loss["kl"] * loss["tokens"] - loss["kl_questions"] * 6 * loss["questions"]) / (6 * loss["spans"])
    assert spans > 0 and loss["kl"] < loss["kl_bound"]
    context.save(tmp_path / "a.kvz")
    assert tiny.open(tmp_path / "a.kvz").stats["loss"] == loss
    exact = tiny.compress(" ".join([TEXT] * 6), 1.0).stats["loss"]
    assert exact["agreement"] == 1 and exact["kl_questions"] < 1e-4


def test_what_a_question_is_made_of_is_a_further_turn() -> None:
    llm = kvzip.wrap(llama(), tiny_tokenizer())
    asking = llm.engine().asking
    whole = llm.question_ids('What does the text say right after "the brown fox"?', first=False)
    shown = [*asking.before.tolist(), *llm.tokenize("the brown fox"), *asking.after.tolist()]
    assert llm.tokenizer.decode(shown) == llm.tokenizer.decode(whole)


def test_it_changes_nothing_else(tiny: kvzip.LLM) -> None:
    found, plain = (tiny.compress(TEXT, 0.3, certify=certify) for certify in (True, False))
    assert plain.data.info.loss is None and torch.equal(found.data.kept_bits, plain.data.kept_bits)
    for ours, theirs in zip(found.data.layers, plain.data.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)


def test_several_compressions_are_measured_alike(tiny: kvzip.LLM) -> None:
    prefilled = tiny.prefill(TEXT)
    found = [prefilled.compress(ratio).stats["loss"] for ratio in (0.5, 0.5, 0.1)]
    first, second, third = ({**loss, "seconds": 0} for loss in found)
    assert first == second and third["kl"] > first["kl"]
    assert {**tiny.compress(TEXT, 0.1).stats["loss"], "seconds": 0} == third, (
        "the same where the full cache is released"
    )


def test_the_full_cache_of_a_long_text_gives_way_before(tiny: kvzip.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[bool] = []
    plain = Certifier.certify

    def watched(certifier: Certifier, *args: object) -> object:
        held.append(any(layer.is_initialized for layer in certifier.full.cache.stored.values()))
        return plain(certifier, *args)

    monkeypatch.setattr(Certifier, "certify", watched)
    short = tiny.compress(TEXT, 0.1).stats["loss"]
    monkeypatch.setattr(certificate, "BOTH_LEN", 0)
    long = tiny.compress(TEXT, 0.1).stats["loss"]
    assert held == [True, False]
    assert long["kl"] == pytest.approx(short["kl"], rel=1e-3) and long["tokens"] == short["tokens"]
    whole = tiny.prefill(TEXT)
    assert {**whole.compress(0.1).stats["loss"], "seconds": 0} == {**short, "seconds": 0}, "where it is kept anyway"


def test_no_full_cache_is_left_where_it_is_released(tiny: kvzip.LLM) -> None:
    whole = tiny.prefill(TEXT)
    whole.compress(0.3, release=True)
    assert not any(layer.is_initialized for layer in whole._full.cache.stored.values())


def test_it_reports_its_progress(tiny: kvzip.LLM) -> None:
    seen: list[tuple[float, float | None]] = []
    tiny.compress(TEXT, 0.5, progress=lambda stage, done, total: stage != "certify" or seen.append((done, total)))
    done, totals = zip(*seen, strict=True)
    assert list(done) == sorted(done) and done[0] == 0 and done[-1] == totals[-1] and len(set(totals)) == 1


@pytest.mark.parametrize("text", ["x", "hello", "the end of it all"])
def test_a_text_that_is_too_short_has_none(tiny: kvzip.LLM, text: str) -> None:
    assert tiny.compress(text, 1.0).stats["loss"] is None


def test_a_text_that_fills_the_positions_has_one_too() -> None:
    llm = kvzip.wrap(llama(), tiny_tokenizer())
    used = len(llm.prefix_ids()) + len(llm.tokenize(TEXT)) + llm.engine().prompts.max_len
    config = LlamaConfig(**SMALL | {"max_position_embeddings": used + MIN_REPLAY_LEN})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    assert kvzip.wrap(model, tiny_tokenizer()).compress(TEXT, 0.5).stats["loss"]["tokens"] > 10


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("kvzip", {"keep_ratio": 0.3, "replay_scope": "local"}),
        ("kvzip+refit", {"keep_ratio": 0.3}),
        ("kvzip", {"keep_ratio": 0.3, "faithful": True}),
        ("int4", {}),
        ("kvzip+int4", {"keep_ratio": 0.5}),
        ("snapkv", {"keep_ratio": 0.5}),
        ("clusterkv:budget=40,skip_first=0,tokens_per_cluster=8", {}),
    ],
)
def test_every_method_has_one(tiny: kvzip.LLM, method: str, options: dict) -> None:
    loss = tiny.compress(TEXT, method=method, **options).stats["loss"]
    assert loss["kl"] > 0


def test_shared_layers_are_measured_against_the_full_cache_where_there_is_one(tiny: kvzip.LLM) -> None:
    save_shared_layers(tiny.fingerprint, {2: 0, 4: 3}, "a test")
    options = kvzip.CompressOptions(method="kvsharer")
    assert tiny.prefill(TEXT).compress(options).stats["loss"]["kl"] > 0.01
    assert tiny.compress(TEXT, method="kvsharer").stats["loss"] is None


@pytest.mark.parametrize("value", [None, 1, "yes"])
def test_other_wishes_are_refused(value: object) -> None:
    with pytest.raises(InputError, match=r"certify .* is neither True nor False"):
        kvzip.CompressOptions(certify=value)


@pytest.mark.real
def test_real_models(llm: kvzip.LLM, articles: list[dict]) -> None:
    prefilled = llm.prefill(articles[0]["text"])
    exact, half, few = (prefilled.compress(ratio).stats["loss"] for ratio in (1.0, 0.5, 0.1))
    assert exact["agreement"] == 1 and exact["kl_bound"] < 1e-4
    assert exact["repeated"] == exact["repeated_full"] > 0.3
    assert 1e-5 < half["kl"] < few["kl"] and few["agreement"] < 1
