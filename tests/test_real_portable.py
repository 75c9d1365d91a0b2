"""The portable layout on real models and real text: a stock cache answers from it as kvzip does from the same pairs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from engine import engine_logits, greedy, same_pairs, session_logits

import kvzip
from kvzip.store import portable

pytestmark = pytest.mark.real
NEW_TOKENS = 12
NOISE = 1e-3  # of log-probabilities; a wrong rotation is off by whole nats
KEEP_RATIO = 0.6


@pytest.fixture(scope="module")
def case(llm: kvzip.LLM, articles: list[dict], tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A model with the shortest article, or two where a sliding window needs more slots; compressed and exported."""
    shortest = sorted(articles, key=lambda a: len(a["text"]))
    windows = [layer.window or 0 for layer in llm.geometry.layers]
    text = "\n".join(article["text"] for article in shortest[: 2 if max(windows) > 1 else 1])
    prefilled = llm.prefill(text)
    context = prefilled.compress(KEEP_RATIO)
    path = tmp_path_factory.mktemp("portable") / "doc.kvp.safetensors"
    info = context.export(path)
    data = same_pairs(prefilled, context.data)
    questions = [question for question, _ in shortest[0]["questions"][:3]]
    return SimpleNamespace(
        llm=llm, prefilled=prefilled, info=info, path=path, context=context, data=data, questions=questions,
        windows=windows,
    )  # fmt: skip


def test_a_stock_cache_answers_as_the_same_pairs_do(case: SimpleNamespace) -> None:
    exported, llm = portable.read(case.path), case.llm
    assert max(case.windows) - 1 <= case.info.num_pairs < 0.65 * case.info.logical_len
    same = kvzip.CompressedContext(llm, case.data)
    for question in case.questions:
        asked = torch.tensor(llm.question_ids(question))
        answer = same.ask(question, max_new_tokens=NEW_TOKENS, eos_token_id=None).token_ids
        whole = torch.cat([asked, torch.tensor(answer)])
        expected = session_logits(llm, case.data, whole).log_softmax(-1)
        found = engine_logits(llm, exported, whole).log_softmax(-1)
        assert (found - expected).abs().max() < NOISE
        assert len(answer) > 0 and greedy(llm, exported, asked, len(answer)) == answer
        elsewhere = engine_logits(llm, exported, whole, -case.info.num_pairs).log_softmax(-1)  # keys turned back by N
        assert (elsewhere - expected).abs().max() > 100 * NOISE, "the rotation must matter"


def test_the_loss_of_one_count_is_stated_beside_that_of_the_file(case: SimpleNamespace) -> None:
    """One count in all heads loses much more; that is what it costs."""
    loss, own = case.info.info.loss, case.info.origin.loss
    assert loss is not None and own == case.context.data.info.loss
    assert loss["tokens"] == own["tokens"] and loss["kl"] > 3 * own["kl"]
    assert case.info.info.keep_ratio == pytest.approx(KEEP_RATIO, abs=0.002)


def test_ranks_choose_what_the_scores_of_a_uniform_budget_choose(case: SimpleNamespace) -> None:
    """256 levels tell pairs apart well enough: the same pairs but for one per cent."""
    count = int(case.data.keep_mask.sum(-1).max())
    heads = case.data.keep_mask.shape[0] * case.data.keep_mask.shape[1]
    options = kvzip.CompressOptions(budget=count * heads, method="kvzip+uniform", certify=False)
    uniform = case.prefilled.compress(options).data
    assert (uniform.keep_mask & case.data.keep_mask).sum() > 0.99 * uniform.keep_mask.sum()
