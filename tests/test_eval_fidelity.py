"""Fidelity without labels, against the reference attention, and against what greedy decoding does."""

from __future__ import annotations

import pytest
import torch
from reference import Reference as SlowReference
from tiny import tiny_model, tiny_tokenizer

import kvzip
from kvzip.errors import InputError
from kvzip.eval.cloze import BLANK, cloze_questions
from kvzip.eval.fidelity import answered, fidelity, make_reference, reconstruction

TEXT = "The quick brown fox jumps over the lazy dog. " * 6
QUESTIONS = ["why?", "who jumps over the dog?", "what is brown?"]


@pytest.fixture(scope="module")
def prefilled() -> kvzip.Prefilled:
    return kvzip.wrap(tiny_model("qwen2", seed=3), tiny_tokenizer()).prefill(TEXT)


def test_the_full_cache_equals_itself(prefilled: kvzip.Prefilled) -> None:
    full = prefilled.compress(1.0)
    for question in QUESTIONS:
        found = fidelity(full, make_reference(full, full.llm.question_ids(question)))
        assert found.kl == pytest.approx(0, abs=1e-6) and found.log_prob_change == pytest.approx(0, abs=1e-5)
        assert found.top1 == 1.0 and found.same_answer


def test_a_compressed_cache_against_the_slow_reference(prefilled: kvzip.Prefilled) -> None:
    full, context = prefilled.compress(1.0), prefilled.compress(0.2)
    llm, data = prefilled.llm, context.data
    prefix = torch.zeros(data.kept_shape[1], data.prefix_len, dtype=torch.bool)
    evicted = {
        layer: torch.cat([prefix, ~mask], 1) for layer, mask in zip(data.full_layers, data.keep_mask, strict=True)
    }
    for question in QUESTIONS:
        reference = make_reference(full, full.llm.question_ids(question), max_new_tokens=6)
        ids = torch.cat([data.prefix_ids.long(), data.context_ids.long(), reference.ids])
        with SlowReference(llm.model) as slow:
            p, q = (
                torch.log_softmax(slow.logits(ids, len(reference.answer_ids), gone, data.logical_len), -1)
                for gone in ({}, evicted)
            )
        found = fidelity(context, reference)
        assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=1e-4)
        assert found.kl > 1e-3
        taken = torch.arange(len(p)), reference.answer_ids
        assert found.log_prob_change == pytest.approx(float((q[taken] - p[taken]).sum()), abs=1e-3)
        assert found.top1 == (q.argmax(-1) == p.argmax(-1)).float().mean()


def test_the_answer_is_what_greedy_decoding_gives(prefilled: kvzip.Prefilled) -> None:
    full = prefilled.compress(1.0)
    seen = set()
    for keep_ratio in (0.02, 0.2, 0.95, 0.999):
        context = prefilled.compress(keep_ratio)
        for question in QUESTIONS:
            reference = make_reference(full, full.llm.question_ids(question), max_new_tokens=5)
            again = context.ask(question, max_new_tokens=5).token_ids
            found, answer = answered(context, reference, 5)
            assert answer == again and found == fidelity(context, reference)
            assert found.same_answer == (again == reference.answer_ids.tolist())
            seen.add(again == reference.answer_ids.tolist())
    assert seen == {True, False}


def test_chunks_of_a_reconstruction_cover_the_text(prefilled: kvzip.Prefilled) -> None:
    """A model that is asked token by token predicts as many as one that is asked for chunks of one."""
    full = prefilled.compress(1.0)
    llm, ids, right = prefilled.llm, full.data.context_ids.long(), 0
    for index in range(len(ids)):
        asked = torch.cat([full.data.prefix_ids.long(), ids, llm.engine().prompts.before(ids, index)])
        with torch.inference_mode():
            logits = llm.model(asked[None], past_key_values=None, logits_to_keep=1).logits
        right += int(logits[0, -1].argmax() == ids[index])
    # merging short last chunks never joins chunks of one
    assert reconstruction(full, chunk_len=1) == pytest.approx(right / len(ids))


@pytest.mark.real
def test_a_real_model_repeats_less_of_what_was_evicted(smollm: kvzip.LLM, articles: list[dict]) -> None:
    prefilled = smollm.prefill(min((a["text"] for a in articles), key=len))
    shares = [reconstruction(prefilled.compress(keep_ratio)) for keep_ratio in (1.0, 0.3, 0.02)]
    assert shares[0] > 0.95
    assert shares[0] >= shares[1] > shares[2] + 0.1


def test_cloze_questions_are_about_rare_words_of_the_text() -> None:
    text = "".join(
        f"In the long and cold winter of {1700 + i} the miller Master{'abcdefghij'[i]}ton sold a horse there. Yes. "
        for i in range(10)
    )
    questions = cloze_questions(text, 4, seed=1)
    assert len({question.text for question in questions}) == 4
    for question in questions:
        (gold,) = question.golds
        sentence = question.text.split('"')[1]
        assert sentence.replace(BLANK, gold) in text and gold not in sentence
    assert cloze_questions(text, 4, seed=1) == questions != cloze_questions(text, 4, seed=2)
    with pytest.raises(InputError, match="has 0 sentences with a rare name"):
        cloze_questions("Nothing here. " * 20, 3)
