"""Engines of many settings and models: answers behind contexts against the Hugging Face path over the same pairs."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import load_real
from ragged import CHAT, SLIDING, SMALL, Case, Question, ask, ask_reference, check, engine, make_case, suite

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")
pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, articles: list[dict]) -> Case:
    return make_case(SMALL, tmp_path_factory.mktemp("small"), articles)


def test_chunked_prefill(small: Case) -> None:
    with engine(SMALL, small.folder, max_num_batched_tokens=8, max_num_seqs=4) as llm:
        check(ask(llm, small.mixed), small.mixed)
        check(ask(llm, small.mixed), small.mixed)


def test_no_prefix_caching_and_torch_compile(small: Case) -> None:
    with engine(SMALL, small.folder, enable_prefix_caching=False, enforce_eager=False) as llm:
        check(ask(llm, small.mixed), small.mixed)
        check(ask(llm, small.mixed), small.mixed)


@pytest.mark.parametrize("name", [SMALL, SLIDING])
def test_portable_contexts_on_the_stock_backend(
    name: str, tmp_path: Path, articles: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One count in all heads, in the paged cache itself: no backend of ours is needed."""
    hf = load_real(name)
    text = hf.tokenizer.decode(hf.tokenize(articles[0]["text"])[:900])
    num_layers, num_heads = hf.geometry.full_shape
    context = hf.compress(text, budget=num_layers * num_heads * 680, method="kvzip+uniform", certify=False)
    context.export(tmp_path / "p.kvp", certify=False)
    questions = [ask_reference(context, "p", q) for q, _ in articles[0]["questions"][:3]]
    context.save(tmp_path / "ragged.kvz")
    monkeypatch.setenv("VLLM_PLUGINS", "")
    with engine(name, tmp_path) as llm:
        check(ask(llm, questions), questions)
        beside_plain = [*questions, Question(None, "Name three colours.")]
        check(ask(llm, beside_plain), beside_plain)
        assert ask(llm, [replace(questions[0], context="ragged")])[0].finish_reason == "error"
    monkeypatch.delenv("VLLM_PLUGINS")
    with engine(name, tmp_path, max_num_batched_tokens=64) as llm:
        both = [replace(questions[0], context=stored) for stored in ("p", "ragged", "p.kvp")]
        check(ask(llm, both), both)


def test_preemption(small: Case) -> None:
    """More requests than the pool holds: some are thrown out and come back."""
    long = [replace(q, reference=None) for key in "ab" for q in small.questions[key]] + small.plain[:1]
    with engine(SMALL, small.folder, num_gpu_blocks_override=24, max_model_len=512) as llm:
        together = ask(llm, long, num_tokens=200, ignore_eos=True)
        preempted = metric(llm, "vllm:num_preemptions")
        assert preempted > 0, "nothing was preempted: the test shows nothing"
        for question, found in zip(long, together, strict=True):
            alone = ask(llm, [question], num_tokens=200, ignore_eos=True)[0]
            assert found.token_ids == alone.token_ids
            assert len(found.token_ids) == 200


def metric(llm: Any, name: str) -> float:
    return sum(getattr(found, "value", 0) for found in llm.get_metrics() if found.name == name)


def test_recycled_handle_blocks(small: Case) -> None:
    """A pool so small that handles become first blocks of plain prompts and the other way round."""
    rng = random.Random(0)
    plain = [replace(small.plain[i % 2], text=small.plain[i % 2].text) for i in range(2)]
    with engine(SMALL, small.folder, num_gpu_blocks_override=10, max_model_len=224, max_num_seqs=2) as llm:
        for _ in range(6):
            for number in range(8):  # many prompts of one block each
                filler = Question(None, f"{rng.random()} {number}?")
                ask(llm, [filler], num_tokens=2)
            some = [small.questions[rng.choice("ab")][rng.randrange(2)], plain[rng.randrange(2)]]
            check(ask(llm, some), some)


def test_qwen(tmp_path: Path, articles: list[dict]) -> None:
    """Two KV heads, biases in the projections; then its heads on two workers."""
    case = make_case(CHAT, tmp_path, articles)
    with engine(CHAT, tmp_path) as llm:
        suite(llm, case)


def test_tensor_parallel(tmp_path: Path, articles: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(CHAT, tmp_path, articles)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    with engine(CHAT, tmp_path, tensor_parallel_size=2) as llm:
        check(ask(llm, case.mixed), case.mixed)
        check(ask(llm, case.mixed), case.mixed)


def test_sliding_windows(tmp_path: Path, articles: list[dict]) -> None:
    """Gemma 3: the context leaves the windows of its sliding layers while questions and answers are read."""
    case = make_case(SLIDING, tmp_path, articles)
    long = [
        ask_reference(case.contexts["a"], "a", "word " * length + case.questions["a"][0].text)
        for length in (17, 497, 706)
    ]
    with engine(SLIDING, tmp_path) as llm:
        both = [*case.questions["a"][:2], *case.questions["b"][:2]]
        check(ask(llm, both), both)
        check(ask(llm, long), long)
        check(ask(llm, long[1:2]), long[1:2])  # warm; it leaves the window while it answers
    with engine(SLIDING, tmp_path, max_num_batched_tokens=64) as llm:
        check(ask(llm, long[1:]), long[1:])
