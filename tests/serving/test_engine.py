"""Answers of an unmodified vLLM behind compressed contexts, against the Hugging Face path over the same pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ragged import (
    BLOCK,
    NOISE,
    PLAIN,
    SMALL,
    Case,
    Question,
    ask,
    ask_reference,
    changed,
    check,
    engine,
    error_of,
    in_a_process,
    make_case,
    suite,
)
from torch import Tensor

from kvzip import store
from kvzip.compressed import CompressedContext
from kvzip.context import RaggedLayer
from kvzip.integrations.vllm.offline import sampling
from kvzip.ops.rope import shift_keys

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")
pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, articles: list[dict]) -> Case:
    return make_case(SMALL, tmp_path_factory.mktemp("small"), articles)


@pytest.fixture(scope="module")
def eager(small: Case) -> Iterator[Any]:
    with engine(SMALL, small.folder, max_context_bytes=64 << 20) as llm:
        yield llm


def test_answers_equal_the_reference(eager: Any, small: Case) -> None:
    suite(eager, small)


def test_an_ordinary_chat_message_works_as_it_is(eager: Any, small: Case) -> None:
    from vllm import SamplingParams

    question = small.questions["a"][0]
    named = SamplingParams(
        temperature=0, max_tokens=24, logprobs=50, extra_args={"kv_transfer_params": {"kvzip": "a.kvz"}}
    )
    found = eager.chat([{"role": "user", "content": question.text}], named, use_tqdm=False)[0].outputs[0]
    check([found], [question])


def test_questions_share_one_handle_block(eager: Any, small: Case) -> None:
    """A warm question computes its own tokens alone, and the handle is in the prefix cache."""
    ids = eager.get_tokenizer()(small.questions["a"][0].text, add_special_tokens=False).input_ids
    for _ in range(2):
        found = eager.generate([{"prompt_token_ids": ids}], [sampling("a", 4, "question")], use_tqdm=False)[0]
    assert found.num_cached_tokens == BLOCK


def compressed(case: Case, key: str, method: str) -> CompressedContext:
    text = case.contexts["a"].llm.tokenizer.decode(case.contexts["a"].data.context_ids.tolist())
    ratio = None if method == "leankv" else 0.4  # decides itself
    context = case.contexts["a"].llm.compress(text, keep_ratio=ratio, method=method, certify=False)
    context.save(case.folder / f"{key}.kvz")
    return context


@pytest.mark.parametrize("method", ["kvzip+refit", "kvzip+refit+int4", "kvzip+k8v4", "leankv", "kvzip:tiny"])
def test_codes_biases_and_levels(method: str, eager: Any, small: Case) -> None:
    name = method.replace("+", "-").replace(":", "-")
    context = compressed(small, name, method)
    questions = [ask_reference(context, name, q.text) for q in small.questions["a"][:2]]
    check(ask(eager, [*questions, small.questions["b"][0]]), [*questions, small.questions["b"][0]])


def test_the_comparison_can_fail(eager: Any, small: Case) -> None:
    """Biases left out, keys that are not turned, another context's pairs: each is far from the reference."""
    context, question = small.contexts["a"], small.questions["a"][0]
    freq = context.llm.geometry.layers[0].inv_freq
    wrong = {
        "no-bias": changed(context, bias=None),
        "turned": replace(context.data, layers=tuple(turned(layer, freq) for layer in context.data.layers)),
        "other": small.contexts["b"].data,
    }
    for name, data in wrong.items():
        store.write(small.folder / f"{name}.kvz", data)
        found = ask(eager, [replace(question, context=name)])[0]
        step, own = found.logprobs[0], question.reference.log_probs[0]
        first = max(abs(step[token].logprob - float(own[token])) for token in step)
        assert first > 100 * NOISE and error_of(found, question.reference) > 100 * NOISE, name


def turned(layer: RaggedLayer, inv_freq: Tensor) -> RaggedLayer:
    return replace(layer, keys=shift_keys(layer.keys, inv_freq, BLOCK))


def test_sampling_options_see_no_context(eager: Any, small: Case) -> None:
    """Several answers of one request, and seeds: as any request has them."""
    question = small.questions["a"][0]
    found = ask(eager, [question, question], seed=7)
    check(found, [question, question])


def refused(llm: Any, question: Question, **options: Any) -> Any:
    return ask(llm, [question], **options)[0]


def test_refused_requests_end_alone(eager: Any, small: Case, tmp_path: Path) -> None:
    good, folder = small.questions["a"][0], small.folder
    context = small.contexts["a"].data
    store.write(folder / "whole.kvz", replace(context, info=replace(context.info, source="not open yet")))
    data = (folder / "whole.kvz").read_bytes()
    (folder / "cut.kvz").write_bytes(data[: len(data) // 2])
    (folder / "flipped.kvz").write_bytes(data[:-100] + bytes([data[-100] ^ 1]) + data[-99:])
    foreign = replace(context, info=replace(context.info, fingerprint="LlamaForCausalLM:0"))
    store.write(folder / "foreign.kvz", foreign)
    bad = [replace(good, context=name) for name in ("nothing", "../a", "cut", "flipped", "foreign", "", ".a", 7)]
    answers = ask(eager, [good, *bad, small.questions["b"][0], *small.plain])
    assert [found.finish_reason for found in answers[1 : 1 + len(bad)]] == ["error"] * len(bad)
    check([answers[0], *answers[1 + len(bad) :]], [good, small.questions["b"][0], *small.plain])
    for name in ("cut", "flipped"):  # whole again, they are served
        (folder / f"{name}.kvz").write_bytes(data)
        check(ask(eager, [replace(good, context=name)]), [good])


def test_prompt_logprobs_and_too_long_answers_are_refused(eager: Any, small: Case) -> None:
    good = small.questions["a"][0]
    assert refused(eager, good, prompt_logprobs=1).finish_reason == "error"
    assert refused(eager, good, num_tokens=2000).finish_reason == "error"  # beyond max_model_len behind the handle
    check(ask(eager, [good]), [good])


def test_a_replaced_file_is_another_context(eager: Any, small: Case) -> None:
    for key in "aba":
        (small.folder / "new.kvz").write_bytes((small.folder / f"{key}.kvz").read_bytes())
        (small.folder / "new.kvz").replace(small.folder / "swapped.kvz")
        question = small.questions[key][0]
        check(ask(eager, [replace(question, context="swapped"), question]), [question, question])
    (small.folder / "swapped.kvz").unlink()
    assert refused(eager, replace(small.questions["a"][0], context="swapped")).finish_reason == "error"


def test_contexts_beyond_the_limit_take_turns(eager: Any, small: Case) -> None:
    """More contexts than fit are opened and given up in turn; each answer stays right."""
    size = small.contexts["a"].data.kv_nbytes
    names = [f"copy{i}" for i in range(2 + (64 << 20) // size)]
    for number, name in enumerate(names):
        data = small.contexts["a"].data
        store.write(small.folder / f"{name}.kvz", replace(data, info=replace(data.info, source=str(number))))
    question = small.questions["a"][0]
    every = [replace(question, context=name) for name in [*names, names[0]]]
    check(ask(eager, every), every)
    for name in names[:2]:
        check(ask(eager, [replace(question, context=name)]), [question])


def plain_steps(store: Path, connector: bool) -> list[tuple[list[int], list[dict[int, float]]]]:
    """Tokens and log-probabilities of plain prompts asked at once, cold and warm; with the plugin, after a context.

    The engine runs in this process, where a step holds the same requests every time: in a process of its own it begins
    as soon as the first of them arrives, and other rows in a matrix product are other roundings.
    """
    questions = [Question(None, text) for text in (*PLAIN, "Tell me a story about a fox.", "Why is the sky blue?")]
    with engine(SMALL, store, connector=connector) as llm:
        if connector:
            ask(llm, [Question("a", PLAIN[1])])
        answers = [*ask(llm, questions), *ask(llm, questions)]
    return [
        (list(one.token_ids), [{token: found.logprob for token, found in step.items()} for step in one.logprobs])
        for one in answers
    ]


def test_plain_prompts_are_bit_identical_to_stock(small: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with_plugin = in_a_process(plain_steps, small.folder, True)
    monkeypatch.setenv("VLLM_PLUGINS", "")
    assert with_plugin == in_a_process(plain_steps, small.folder, False)
