"""What must hold on real models and real text."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from reference import Reference, Unwrapped
from transformers import DynamicCache

import kvzip
from kvzip.chunks import chunk_slices
from kvzip.compress import FullContext, pack_context
from kvzip.context import ContextInfo, RaggedContext
from kvzip.eval.fidelity import fidelity
from kvzip.eval.questions import ask_full
from kvzip.eval.tasks.base import Question
from kvzip.eval.tasks.squad import Squad
from kvzip.hf.cache import SessionCache
from kvzip.methods import parse_method
from kvzip.ops.selection import select_global
from kvzip.profiles import save_profile
from kvzip.selecting import Selection

pytestmark = pytest.mark.real
METHODS = ["kvzip", "kvzip+layer", "kvzip+uniform", "kvzip-head"]
NEW_TOKENS = 12
NOISE = 2e-3  # logits are about 20; float32 sums in another order, and RoPE's own float32 angles, differ by 1e-4


@pytest.fixture(scope="module")
def case(llm: kvzip.LLM, articles: list[dict]) -> SimpleNamespace:
    """One model with the shortest article, read once."""
    article = min(articles, key=lambda a: len(a["text"]))
    questions = [q for q, _ in article["questions"]]
    return SimpleNamespace(llm=llm, text=article["text"], prefilled=llm.prefill(article["text"]), questions=questions)


def full_ids(case: SimpleNamespace, question: str) -> tuple[torch.Tensor, int]:
    """Prefix + context + question, and how many tokens the question has."""
    asked = torch.tensor(case.llm.question_ids(question))
    full = case.prefilled._full
    return torch.cat([full.prefix_ids, full.context_ids, asked]), len(asked)


@torch.inference_mode()
def own_logits(llm: kvzip.LLM, ids: torch.Tensor, last: int) -> torch.Tensor:
    """The model's own logits with its own full cache."""
    return llm.model(ids[None], past_key_values=DynamicCache(config=llm.model.config), logits_to_keep=last).logits[0]


@torch.inference_mode()
def session_logits(llm: kvzip.LLM, data: RaggedContext, asked: torch.Tensor) -> torch.Tensor:
    return llm.model(asked[None], past_key_values=SessionCache(data, llm.backend)).logits[0]


def test_keep_ratio_one_has_the_models_own_logits_and_answers(case: SimpleNamespace) -> None:
    context = case.prefilled.compress(1.0)
    for question in case.questions[:3]:
        ids, asked = full_ids(case, question)
        expected = own_logits(case.llm, ids, asked)
        ours = session_logits(case.llm, context.data, ids[-asked:])
        assert (ours - expected).abs().max() < NOISE
        own = case.llm.model.generate(
            ids[None], max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        answer = context.ask(question, max_new_tokens=NEW_TOKENS, eos_token_id=None)
        length = len(answer.token_ids)
        assert answer.token_ids == own[0, len(ids) :].tolist()[:length] and length > 0


def evicted_pairs(data: RaggedContext) -> dict[int, torch.Tensor]:
    """What is gone, as the reference takes it: layer -> [Hkv, P + S] bool."""
    mask = data.keep_mask
    prefix = torch.zeros(mask.shape[1], data.prefix_len, dtype=torch.bool)
    return {layer: torch.cat([prefix, ~mask[i]], 1) for i, layer in enumerate(data.full_layers)}


@pytest.mark.parametrize("method", METHODS)
def test_eviction_equals_masking_alone_and_in_a_batch(
    case: SimpleNamespace, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if method == "kvzip-head":
        monkeypatch.setenv("KVZIP_CACHE", str(tmp_path))
        heads = case.prefilled.scores(parse_method("kvzip")).amax(dim=-1)
        save_profile("head", case.llm.fingerprint, {"head_scores": heads}, "test")
    data = (context := case.prefilled.compress(kvzip.CompressOptions(keep_ratio=0.3, method=method))).data
    questions = case.questions[:4]
    answers = context.ask_many(questions, max_new_tokens=6, eos_token_id=None)
    with Reference(case.llm.model) as reference:
        for question, answer in zip(questions, answers, strict=True):
            ids, asked = full_ids(case, question)
            ids = torch.cat([ids, torch.tensor(answer.token_ids)])
            last = asked + len(answer.token_ids)
            expected = reference.logits(ids, last, evicted_pairs(data), data.logical_len)
            full = reference.logits(ids, last, {}, data.logical_len)
            with Unwrapped(reference):
                ours = session_logits(case.llm, data, ids[-last:])
            assert (ours - expected).abs().max() < NOISE
            assert (full - expected).abs().max() > 10 * NOISE, "the mask must matter"
            assert expected[asked - 1 : -1].argmax(-1).tolist() == answer.token_ids


@pytest.mark.parametrize(("method", "limit"), [("k8v4", 0.003), ("int4", 0.015)])
def test_quantized_pairs_stay_close_to_the_full_cache(case: SimpleNamespace, method: str, limit: float) -> None:
    """Mean KL of the answers' tokens. The bounds are of one model."""
    if case.llm.name != "qwen2.5-coder-0.5b":
        pytest.skip("the bounds are of qwen2.5-coder-0.5b")
    questions = [Question(text, ("",)) for text in case.questions[:6]]
    asked = ask_full(Squad(), case.prefilled.compress(1.0), questions, "multi-request")
    context = case.prefilled.compress(kvzip.CompressOptions(method=method))
    found = [fidelity(context, one.reference).kl for one in asked]
    assert 0 < sum(found) / len(found) <= limit
    assert context.data.kv_nbytes < 0.25 * context.data.info.full_kv_nbytes  # of float32


def test_counts_are_exact(case: SimpleNamespace) -> None:
    total = case.prefilled.scores(parse_method("kvzip")).numel()
    for keep_ratio in (0.1, 0.3, 0.77):
        data = case.prefilled.compress(keep_ratio).data
        assert data.keep_mask.sum() == round(keep_ratio * total)
        assert data.info.keep_ratio == pytest.approx(keep_ratio, abs=1 / total)
        full_pairs = sum(sum(data.pairs_per_head[i]) for i in data.full_layers)
        assert full_pairs == data.keep_mask.sum() + data.prefix_len * len(data.full_layers) * data.kept_shape[1]
    for budget in (1, 1000):
        options = kvzip.CompressOptions(budget=budget)
        assert case.prefilled.compress(options).data.keep_mask.sum() == budget
    most = case.prefilled.compress(0.5).data.kv_nbytes
    assert 0 <= most - case.prefilled.compress(kvzip.CompressOptions(budget=f"{most}B")).data.kv_nbytes < 4096


def test_scores_equal_the_direct_computation(case: SimpleNamespace) -> None:
    full, geometry = case.prefilled._full, case.llm.geometry
    context_len, chunk_len = len(full.context_ids), 200
    layer = geometry.layers[geometry.full_layers[0]]
    for faithful, scope in ((False, "global"), (True, "global"), (False, "local")):
        method = parse_method("kvzip")
        ours = case.prefilled.scores(method, chunk_len, faithful=faithful, replay_scope=scope)
        chunks = chunk_slices(context_len, chunk_len, merge_short=not faithful)
        with Reference(case.llm.model) as reference:
            expected = reference.scores(
                full.prefix_ids,
                full.context_ids,
                list(full._replays(chunks)),
                geometry.full_layers,
                None if faithful else (lambda _: layer.scale),
                None if faithful else layer.softcap,
                scope == "local",
            )
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=5e-3)
        assert ours.shape == (len(geometry.full_layers), layer.num_kv_heads, context_len)


def test_contexts_of_any_length(llm: kvzip.LLM, articles: list[dict]) -> None:
    """One text that grows, so that the longest of these contexts is also read in many uneven blocks."""
    sizes = {1: [1], 7: [7], 1999: [1999], 2000: [2000], 2001: [2001], 4003: [2000, 2003]}
    ids = llm.tokenize("\n\n".join(a["text"] for a in articles))[: max(sizes)]
    full = FullContext(llm.engine(), torch.tensor(llm.prefix_ids()), ids)
    for length, chunk_sizes in sizes.items():
        full.context_ids = ids[:length]
        full.prefill()
        scores = full.score()
        assert [c.stop - c.start for c in chunk_slices(length, 2000)] == chunk_sizes
        assert scores.shape[-1] == length
        assert torch.isfinite(scores).all() and scores.min() >= 0 and scores.max() <= 1
        assert (scores.amax(dim=(0, 1)) > 0).all(), "every token gets attention"
    data = pack(full, scores, keep_ratio=0.3)
    asked = torch.tensor(llm.question_ids("What is this text about?"))
    evicted = session_logits(llm, data, asked)
    expected = own_logits(llm, torch.cat([full.prefix_ids, ids, asked]), len(asked))
    whole = session_logits(llm, pack(full, scores, keep_ratio=1), asked)
    assert (whole - expected).abs().max() < NOISE < (evicted - expected).abs().max()


def pack(full: FullContext, scores: torch.Tensor, keep_ratio: float) -> RaggedContext:
    """What `compress` makes of these scores."""
    mask = select_global(scores, round(keep_ratio * scores.numel()))
    info = ContextInfo("", "", "", "float32", keep_ratio, None, keep_ratio, 0)
    return pack_context(full, Selection(mask, None), info, release=False)


def test_chunked_equals_unchunked(case: SimpleNamespace) -> None:
    full = case.prefilled._full
    other = FullContext(full.engine, full.prefix_ids, full.context_ids)
    other.prefill(block_len=97)
    keep = case.prefilled.compress(0.3).data.keep_mask
    for a, b in zip(full.evict(keep), other.evict(keep), strict=True):
        torch.testing.assert_close(a.keys, b.keys, atol=2e-3, rtol=1e-3)
        torch.testing.assert_close(a.values, b.values, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(other.score(), full.score(), atol=2e-3, rtol=1e-2)


def test_a_saved_context_answers_the_same_in_a_new_process(case: SimpleNamespace, tmp_path: Path) -> None:
    context = case.prefilled.compress(0.3)
    path = tmp_path / "article.kvz"
    context.save(path)
    questions = case.questions[:2]
    expected = [context.ask(q, max_new_tokens=NEW_TOKENS).token_ids for q in questions]
    reopened = case.llm.open(path)
    assert [reopened.ask(q, max_new_tokens=NEW_TOKENS).token_ids for q in questions] == expected
    for mapped, loaded in zip(reopened.data.layers, context.data.layers, strict=True):
        assert torch.equal(mapped.keys, loaded.keys) and torch.equal(mapped.values, loaded.values)
    code = (
        "import sys, json, kvzip; name, path, *qs = sys.argv[1:]; c = kvzip.load(name).open(path);"
        f"print(json.dumps([c.ask(q, max_new_tokens={NEW_TOKENS}).token_ids for q in qs]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, case.llm.name, str(path), *questions], capture_output=True, text=True, check=True
    )
    assert json.loads(run.stdout.strip().splitlines()[-1]) == expected


def test_asking_a_b_a_gives_the_same_first_and_last_answer(case: SimpleNamespace) -> None:
    context = case.prefilled.compress(0.3)
    first, other, last = (context.ask(case.questions[i], max_new_tokens=NEW_TOKENS) for i in (0, 1, 0))
    assert first.token_ids == last.token_ids
    session = context.session()
    again = []
    for index in (0, 1, 0):
        again.append(session.ask(case.questions[index], max_new_tokens=NEW_TOKENS).token_ids)
        session.rewind()
    assert again == [first.token_ids, other.token_ids, first.token_ids]


def test_a_conversation_equals_a_fresh_run_over_everything(case: SimpleNamespace) -> None:
    llm, session = case.llm, case.prefilled.compress(1.0).session()
    ids, _ = full_ids(case, case.questions[0])
    for turn, question in enumerate(case.questions[:3]):
        if turn:
            ids = torch.cat([ids, torch.tensor(llm.question_ids(question, first=False))])
        answer = session.ask(question, max_new_tokens=NEW_TOKENS)
        own = llm.model.generate(
            ids[None],
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=llm.generator.end_ids,
            pad_token_id=llm.generator.pad_id,
        )[0, len(ids) :].tolist()
        assert answer.token_ids == own[: len(answer.token_ids)]
        ids = torch.cat([ids, torch.tensor(llm.generator.without_end(answer.token_ids), dtype=torch.int64)])
    session.rewind(2)
    repeated = session.ask(case.questions[1], max_new_tokens=NEW_TOKENS)
    assert str(repeated) == str(session.turns[1][1]) and len(session.turns) == 2


def test_a_saved_conversation_goes_on_as_if_it_had_never_stopped(case: SimpleNamespace, tmp_path: Path) -> None:
    session = case.prefilled.compress(0.5).session()
    session.ask(case.questions[0], max_new_tokens=NEW_TOKENS)
    session.ask(case.questions[1], max_new_tokens=NEW_TOKENS)
    session.save(tmp_path / "chat.kvz")
    expected = session.ask(case.questions[2], max_new_tokens=NEW_TOKENS)
    reopened = case.llm.open_session(tmp_path / "chat.kvz")
    assert reopened.turns == session.turns[:2]
    assert reopened.ask(case.questions[2], max_new_tokens=NEW_TOKENS).token_ids == expected.token_ids
    reopened.rewind(2)
    session.rewind(2)
    answers = [s.ask(case.questions[3], max_new_tokens=NEW_TOKENS).token_ids for s in (reopened, session)]
    assert answers[0] == answers[1]


def test_threads_share_a_context(case: SimpleNamespace) -> None:
    context, questions = case.prefilled.compress(0.3), case.questions[:4]
    expected = [context.ask(q, max_new_tokens=6).token_ids for q in questions]
    found: dict[int, list[int]] = {}

    def work(index: int) -> None:
        found[index] = context.ask(questions[index], max_new_tokens=6).token_ids

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(4)] == expected


def test_a_stream_gives_the_answer_and_can_be_stopped(case: SimpleNamespace) -> None:
    context, question = case.prefilled.compress(0.3), case.questions[0]
    whole = context.ask(question, max_new_tokens=NEW_TOKENS)
    pieces = list(context.stream(question, max_new_tokens=NEW_TOKENS))
    assert len(pieces) > 1
    assert "".join(pieces).strip().startswith(str(whole))
    session = context.session()
    stream = session.stream(question, max_new_tokens=500)
    next(stream)
    stream.close()
    assert len(session.turns) == 1 and len(session.turns[0][1]) < 500
    session.rewind()
    assert session.ask(question, max_new_tokens=NEW_TOKENS).token_ids == whole.token_ids


def test_generate_takes_the_cache(case: SimpleNamespace) -> None:
    from transformers import LogitsProcessor, LogitsProcessorList, TextStreamer

    llm, context = case.llm, case.prefilled.compress(0.3)
    asked = torch.tensor([llm.question_ids(case.questions[0])])
    out = llm.model.generate(asked, past_key_values=context.cache(), max_new_tokens=8, do_sample=False, pad_token_id=0)
    answer = context.ask(case.questions[0], max_new_tokens=6).token_ids
    assert out[0, asked.shape[1] :].tolist()[: len(answer)] == answer

    class Forbid(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:, answer[0]] = -torch.inf
            return scores

    options = {"max_new_tokens": 8, "logits_processor": LogitsProcessorList([Forbid()])}
    assert answer[0] not in context.ask(case.questions[0], **options).token_ids
    torch.manual_seed(3)
    first = context.ask(case.questions[0], max_new_tokens=8, do_sample=True, temperature=0.8, top_k=20)
    torch.manual_seed(3)
    assert first == context.ask(case.questions[0], max_new_tokens=8, do_sample=True, temperature=0.8, top_k=20)
    context.ask(case.questions[0], max_new_tokens=4, streamer=TextStreamer(llm.tokenizer))
    whole = str(context.ask(case.questions[0], max_new_tokens=NEW_TOKENS))
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    stopped = context.ask(case.questions[0], max_new_tokens=NEW_TOKENS, stop_strings=[stop])
    assert stop in stopped and len(stopped) < len(whole)
    beams = context.ask(case.questions[0], max_new_tokens=8, num_beams=2)
    assert beams.num_new_tokens > 0
