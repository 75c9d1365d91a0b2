"""A small evaluation of a real model, as a user would run it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import SHARED_DATA

import kvzip
from kvzip.eval.page import report_page
from kvzip.eval.run import evaluate, read_rows
from kvzip.eval.settings import EvalSettings
from kvzip.eval.summary import summarize
from kvzip.eval.tasks import get_task
from kvzip.eval.tasks.base import TaskSettings

pytestmark = pytest.mark.real


@pytest.mark.parametrize("name", ["retr-kv", "retr-prefix-suffix", "niah", "ruler-multikey"])
def test_a_sentence_with_what_was_asked_fits_into_an_answer(smollm: kvzip.LLM, name: str) -> None:
    """Chat models say a key again before its value: an answer that is cut there would count as wrong."""
    task, count = get_task(name), lambda text: len(smollm.tokenize(text))
    for sample in task.samples(TaskSettings(800, count, 2)):
        for question in sample.questions:
            quoted = re.findall(r'"([^"]+)"', question.text)
            sentence = f"The answer that belongs to {' and '.join(quoted)} in this text is: {question.golds[0]}."
            assert count(sentence) <= (question.max_new_tokens or task.max_new_tokens)


def test_a_smoke_evaluation(smollm: kvzip.LLM, articles: list[dict], tmp_path: Path) -> None:
    """Two texts of real articles, two keep ratios: all kept is the full cache, and what KVzip keeps beats chance."""
    settings = EvalSettings(
        tasks=("squad",), methods=("kvzip",), keep_ratios=(1, 0.3), context_len=700, limit=2, max_questions=4,
        data={"squad": str(SHARED_DATA / "xquad.en.dev.json")},
    )  # fmt: skip
    path = tmp_path / "rows.jsonl"
    evaluate(smollm, settings, path, about={})
    header, rows = read_rows(path)
    lines = {(line.method, line.keep_ratio_asked): line for line in summarize(rows)}
    assert len(lines) == 7 and all(line.num_questions == 8 and not line.gaps for line in lines.values())
    full = lines["full", 1.0]
    assert full.score, "else nothing can be lost"
    for method in ("kvzip", "random", "streaming-llm"):
        kept = lines[method, 1]
        assert kept.score == full.score and kept.same == 1.0 and kept.kl == pytest.approx(0, abs=1e-5)
        assert lines[method, 0.3].nbytes == pytest.approx(0.3 * full.nbytes, rel=0.1)
    for other in ("random", "streaming-llm"):
        assert lines["kvzip", 0.3].kl < 0.5 * lines[other, 0.3].kl
    assert "<h2>squad</h2>" in report_page(header, rows)
