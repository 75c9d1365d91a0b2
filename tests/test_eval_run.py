"""Runs of tasks over methods: rows, gaps, and going on after a stop."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model, tiny_tokenizer

import kvzip
from kvzip.errors import BudgetError, InputError, UnknownNameError
from kvzip.eval.page import report_page
from kvzip.eval.run import EvalSettings, evaluate, hash_of, read_rows
from kvzip.eval.summary import summarize

SETTINGS: dict[str, Any] = {
    "tasks": ("niah", "math-find"), "methods": ("kvzip", "random"), "keep_ratios": (0.5, 0.2), "context_len": 300,
    "limit": 2,
}  # fmt: skip
TIMES = ("prefill_s", "score_s", "ask_s")


@pytest.fixture(scope="module")
def tiny() -> kvzip.LLM:
    return kvzip.wrap(tiny_model("qwen2", seed=3), tiny_tokenizer())


def run(llm: kvzip.LLM, path: Path, **changes: Any) -> tuple[dict, list[dict]]:
    evaluate(llm, EvalSettings(**SETTINGS | changes), path, about={})
    return read_rows(path)


def timeless(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


@pytest.fixture(scope="module")
def whole(tiny: kvzip.LLM, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    path = tmp_path_factory.mktemp("eval") / "rows.jsonl"
    return path, run(tiny, path)[1]


def test_there_is_a_row_for_everything_that_was_asked(whole: tuple[Path, list[dict]]) -> None:
    rows = whole[1]
    found = [(row["task"], row["sample"], row["method"], row["keep_ratio_asked"]) for row in rows]
    pairs = [("full", 1.0), ("kvzip", 0.5), ("kvzip", 0.2), ("random", 0.5), ("random", 0.2)]
    assert found == [(task, sample, *pair) for task in ("niah", "math-find") for sample in (0, 1) for pair in pairs]
    for row in rows:
        assert row["kind"] == "row"
        assert row["keep_ratio"] == pytest.approx(row["keep_ratio_asked"], abs=0.01)
        assert len(row["questions"]) == (1 if row["task"] == "niah" else 5)
        if row["method"] == "full":
            assert all(q["kl"] == pytest.approx(0, abs=1e-6) and q["same_answer"] for q in row["questions"])
            assert row["kv_nbytes"] == pytest.approx(row["full_kv_nbytes"], rel=0.02)
        else:
            assert row["kv_nbytes"] < 0.8 * row["full_kv_nbytes"]


@pytest.mark.parametrize("cut", [0, 1, 0.3, 0.62, -1, -2])
def test_a_stopped_run_goes_on_and_ends_the_same(
    tiny: kvzip.LLM, whole: tuple[Path, list[dict]], tmp_path: Path, cut: float
) -> None:
    """Killed at any byte: before the header, in the middle of a line, right before the last line's end."""
    content = whole[0].read_bytes()
    at = round(cut * len(content)) if 0 < cut < 1 else int(cut) % len(content)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content[:at])
    if at == 1:  # a header that was cut off says nothing of its settings
        with pytest.raises(InputError, match="not a result file"):
            run(tiny, path)
        return
    assert timeless(run(tiny, path)[1]) == timeless(whole[1])


def test_the_page_shows_every_task_and_escapes_what_models_say(whole: tuple[Path, list[dict]]) -> None:
    header, rows = read_rows(whole[0])
    hostile = [
        *rows,
        {"kind": "gap", "task": "t", "sample": 0, "method": "<m>", "keep_ratio_asked": 0.5, "reason": "<b>"},
    ]
    page = report_page(header, hostile)
    for task in SETTINGS["tasks"]:
        assert f"<h2>{task}</h2>" in page
    assert page.count("<svg") == len(SETTINGS["tasks"]) and "&lt;b&gt;" in page and "<b>" not in page
    assert not re.search(r'(src|href)="(?!#)', page), "nothing is loaded"
    assert "<script" not in page


def test_a_finished_run_is_not_measured_again(
    tiny: kvzip.LLM, whole: tuple[Path, list[dict]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvzip.LLM, "prefill", lambda *args, **kwargs: pytest.fail("measured again"))
    before = whole[0].read_bytes()
    run(tiny, whole[0])
    assert whole[0].read_bytes() == before


def test_a_file_of_other_settings_is_refused(tiny: kvzip.LLM, whole: tuple[Path, list[dict]], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds a run of other settings"):
        run(tiny, whole[0], seed=1)
    other = tmp_path / "x.jsonl"
    other.write_text('{"kind": "row"}\n')
    with pytest.raises(InputError, match="not a result file"):
        run(tiny, other)


def test_what_can_not_be_measured_is_a_gap_and_the_rest_goes_on(tiny: kvzip.LLM, tmp_path: Path) -> None:
    changes = {
        "tasks": ("squad", "retr-kv", "niah"),
        "methods": ("kvzip-head", "kvzip"),
        "keep_ratios": (0.5,),
        "limit": 1,
    }
    rows = run(tiny, tmp_path / "rows.jsonl", **changes, context_len=60)[1]
    gaps = {(row["task"], row["method"]): row["reason"] for row in rows if row["kind"] == "gap"}
    assert "needs a SQuAD JSON file" in gaps["squad", "full"]
    assert "needs a context of at least" in gaps["retr-kv", "full"]
    assert "profile-heads" in gaps["niah", "kvzip-head"]
    lines = summarize(rows)
    assert [(line.task, line.method) for line in lines] == [("niah", "full"), ("niah", "kvzip")]


def test_summaries_by_hand() -> None:
    def row(sample: int, method: str, scores: list[float]) -> dict:
        questions = [{"score": s, "kl": 0.5, "same_answer": s == 1} for s in scores]
        sizes = {"keep_ratio": 0.5, "keep_ratio_asked": 0.5, "kv_nbytes": 10, "full_kv_nbytes": 20}
        return {"kind": "row", "task": "t", "sample": sample, "method": method, "questions": questions, **sizes}

    rows = [row(0, "full", [1, 1]), row(1, "full", [1, 0]), row(0, "m", [1, 0]), row(1, "m", [0, 0])]
    rows.append({"kind": "gap", "task": "t", "sample": 2, "method": "m", "keep_ratio_asked": 0.5, "reason": "x"})
    full, method = summarize(rows)
    assert (full.score, full.relative) == (0.75, 1.0)
    assert (method.score, method.gaps, method.num_contexts, method.num_questions) == (0.25, 1, 2, 4)
    assert method.relative == pytest.approx(1 / 3)
    assert (method.kl, method.same, method.nbytes, method.full_nbytes) == (0.5, 0.25, 10, 20)
    assert method.error == pytest.approx((0.5**2 + 0.5**2) ** 0.5 / 4)


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        ({"tasks": ("niahh",)}, UnknownNameError, "did you mean 'niah'"),
        ({"methods": ("kvzipp",)}, UnknownNameError, "did you mean 'kvzip'"),
        ({"keep_ratios": (1.5,)}, BudgetError, "1.5"),
        ({"keep_ratios": (1.0,)}, InputError, "always measured"),
        ({"limit": 0}, InputError, "limit 0"),
    ],
)
def test_bad_settings_are_refused_before_any_work(change: dict, error: type, reason: str) -> None:
    with pytest.raises(error, match=reason):
        EvalSettings(**SETTINGS | change)


def test_the_hash_tells_settings_apart() -> None:
    assert hash_of({"a": 1, "b": 2}) == hash_of({"b": 2, "a": 1}) != hash_of({"a": 1, "b": 3})
    json.dumps(hash_of({}))
