"""What kvzip and kvpress do differently, each cause alone, without kvpress: bench/parity.py measures both together."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import reference
import torch
from reference import Reference
from tiny import tiny_model, tiny_tokenizer

import kvzip
from kvzip.chunks import chunk_slices
from kvzip.compress import FullContext, pack_context
from kvzip.methods import parse_method
from kvzip.selecting import Selection

sys.path.append(str(Path(__file__).parents[1] / "bench"))
import compared
import parity
from parity import NUM_SINKS, FewSinksScorer

TEXT = "The quick brown fox jumps over the lazy dog. " * 5 + "It was 1859; nobody knew why the lamp went out."


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def llm(request: pytest.FixtureRequest) -> kvzip.LLM:
    return kvzip.wrap(tiny_model(request.param, seed=3), tiny_tokenizer())


@pytest.fixture(scope="module")
def full(llm: kvzip.LLM) -> kvzip.Prefilled:
    return llm.prefill(TEXT)


def few_sinks(context: FullContext, shape: torch.Size, chunk_len: int) -> torch.Tensor:
    scorer = FewSinksScorer(shape)
    context.replay(scorer, chunk_len, merge_short=False)
    return scorer.scores()


def test_the_softmax_over_four_sinks_is_that_of_the_reference(llm: kvzip.LLM, full: kvzip.Prefilled) -> None:
    """The oracle of all scores, its softmax over sinks, chunk and replay alone."""
    context, whole = full._full, full.scores(parse_method("kvzip"))
    prefix_len, total = context.prefix_ids.numel(), context.context_ids.numel()
    [(chunk, ids)] = context._replays(chunk_slices(total, 2048, merge_short=False))
    with Reference(llm.model) as oracle:
        oracle.scores(context.prefix_ids, context.context_ids, [(chunk, ids)], (0,))
        expected = []
        for layer, (query, keys) in sorted(reference.STATE.seen.items()):
            few = torch.cat([keys[:, :, :NUM_SINKS], keys[:, :, prefix_len:]], dim=2)
            reference.STATE.seen[layer] = (query, few)
            expected.append(oracle._chunk_scores(layer, NUM_SINKS, chunk, len(ids), None, None))
    found = few_sinks(context, whole.shape, 2048)
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-4)
    assert (found >= whole - 1e-5).all()  # fewer keys share the weight; to float32
    assert (found > whole + 1e-3).any()


def test_a_prefix_of_four_tokens_leaves_no_difference(llm: kvzip.LLM, full: kvzip.Prefilled) -> None:
    context = FullContext(llm.engine(), full._full.prefix_ids[:NUM_SINKS], full._full.context_ids)
    context.prefill()
    whole = context.score()
    torch.testing.assert_close(few_sinks(context, whole.shape, 2048), whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("keep_ratio", [0.5, 0.3, 0.1])
def test_a_budget_that_counts_the_prefix_keeps_other_counts(full: kvzip.Prefilled, keep_ratio: float) -> None:
    scores, prefix_len = full.scores(parse_method("kvzip")), full._full.prefix_ids.numel()
    mask = parity.keep_with_prefix(scores, prefix_len, keep_ratio)
    assert mask[..., :NUM_SINKS].all() and not mask[..., NUM_SINKS:prefix_len].any()
    heads, total = scores.shape[0] * scores.shape[1], scores.shape[2]
    in_context = heads * (keep_ratio * (prefix_len + total) - NUM_SINKS)
    assert mask[..., prefix_len:].sum() == pytest.approx(in_context, abs=1)
    ours = parity.keep(scores, keep_ratio)
    assert ours.sum() == round(keep_ratio * scores.numel())
    few, many = sorted([ours, mask[..., prefix_len:]], key=lambda m: int(m.sum()))
    assert not (few & ~many).any()  # the order is the same, the one reaches further


def test_a_prefix_evicted_but_for_its_sinks_changes_answers(llm: kvzip.LLM, full: kvzip.Prefilled) -> None:
    """The same pairs of the context, with and without the rest of the prefix."""
    prefix_ids, context_ids = full._full.prefix_ids, full._full.context_ids
    asked = torch.tensor(llm.question_ids("why?"))
    ids, context_len = torch.cat([prefix_ids, context_ids, asked]), len(prefix_ids) + len(context_ids)
    pairs = parity.keep(full.scores(parse_method("kvzip")), 0.3)
    evicted = {
        layer: torch.cat([torch.zeros(len(mask), len(prefix_ids), dtype=torch.bool), ~mask], dim=1)
        for layer, mask in enumerate(pairs)
    }
    with Reference(llm.model) as oracle:
        kept = oracle.logits(ids, 1, evicted, split=context_len)
        for mask in evicted.values():
            mask[:, NUM_SINKS : len(prefix_ids)] = True
        without = oracle.logits(ids, 1, evicted, split=context_len)
    packed = pack_context(full._full, Selection(pairs, None), full.compress(0.3).data.info, release=False)
    answer = kvzip.CompressedContext(llm, packed).ask("why?", max_new_tokens=1)
    assert answer.token_ids == kept.argmax(-1).tolist()
    assert (kept - without).abs().max() > 1e-2


def test_a_short_last_chunk_alone_has_higher_scores(full: kvzip.Prefilled) -> None:
    context, shape = full._full, full.scores(parse_method("kvzip")).shape
    chunk_len = shape[2] * 3 // 7  # two chunks, and a third of one
    assert len(chunk_slices(shape[2], chunk_len, merge_short=False)) == len(chunk_slices(shape[2], chunk_len)) + 1
    alone, merged = few_sinks(context, shape, chunk_len), FewSinksScorer(shape)
    context.replay(merged, chunk_len, merge_short=True)
    last = slice(2 * chunk_len, None)
    assert alone[..., last].mean() > merged.scores()[..., last].mean()
    torch.testing.assert_close(alone[..., :chunk_len], merged.scores()[..., :chunk_len])


def test_both_rank_and_overlap_as_defined() -> None:
    assert compared.mean_ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]
    assert compared.spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 4.0, 9.0])) == pytest.approx(1)
    assert compared.spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 1.0, 2.0])) == pytest.approx(-0.5)
    assert compared.spearman(torch.tensor([1.0, 2.0]), torch.zeros(2)) == 0
    assert compared.overlap(torch.tensor([True, True, False]), torch.tensor([True, False, False])) == pytest.approx(
        2 / 3
    )
