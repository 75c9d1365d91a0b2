"""Runs of tasks over methods: rows, gaps, and going on after a stop."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model, tiny_tokenizer

import kvzip
from kvzip.certificate import Certifier
from kvzip.errors import BudgetError, InputError, UnknownNameError
from kvzip.eval.compare import compare
from kvzip.eval.fidelity import answer_ids
from kvzip.eval.markdown import section
from kvzip.eval.page import report_page
from kvzip.eval.plots import save_pictures
from kvzip.eval.questions import ask_full
from kvzip.eval.run import evaluate, read_rows
from kvzip.eval.settings import EvalSettings, hash_of
from kvzip.eval.summary import Line, less_text, summarize
from kvzip.eval.tasks import get_task
from kvzip.eval.tasks.base import Question, choose

SETTINGS: dict[str, Any] = {
    "tasks": ("niah", "math-find"), "methods": ("kvzip", "random"), "keep_ratios": (1, 0.2), "context_len": 300,
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


def test_there_is_a_row_for_everything_and_the_baselines(whole: tuple[Path, list[dict]]) -> None:
    rows = [row for row in whole[1] if row["kind"] == "row"]
    asked = [row for row in whole[1] if row["kind"] == "asked"]
    found = [(row["task"], row["sample"], row["method"], row["keep_ratio_asked"]) for row in rows]
    pairs = [("full", 1.0), *((method, r) for method in ("kvzip", "random", "streaming-llm") for r in (1, 0.2))]
    assert found == [(task, sample, *pair) for task in ("niah", "math-find") for sample in (0, 1) for pair in pairs]
    assert [(row["task"], row["sample"]) for row in asked] == [(t, i) for t in ("niah", "math-find") for i in (0, 1)]
    assert [len(row["questions"]) for row in asked] == [1, 1, 5, 5]
    for row in rows:
        assert row["keep_ratio"] == pytest.approx(row["keep_ratio_asked"], abs=0.01)
        assert len(row["answers"]) == (1 if row["task"] == "niah" else 5)
        shares = [share for layer in row["kept_share"] for share in layer]
        assert sum(shares) / len(shares) == pytest.approx(row["keep_ratio"], abs=1e-3)


def test_no_loss_is_measured_twice(tiny: kvzip.LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("an evaluation needs no certificate")

    monkeypatch.setattr(Certifier, "ask_full", fail)
    assert run(tiny, tmp_path / "rows.jsonl", tasks=("niah",), limit=1, context_len=1500)[1]


def test_keep_ratio_1_of_any_method_is_the_full_cache(whole: tuple[Path, list[dict]]) -> None:
    full = {(r["task"], r["sample"]): r["answers"] for r in whole[1] if r["kind"] == "row" and r["method"] == "full"}
    for row in whole[1]:
        if row["kind"] == "row" and row["keep_ratio_asked"] == 1:
            assert row["kv_nbytes"] == pytest.approx(row["full_kv_nbytes"], rel=0.02)
            for answer, before in zip(row["answers"], full[row["task"], row["sample"]], strict=True):
                assert answer["kl"] == pytest.approx(0, abs=1e-6) and answer["same_answer"]
                assert (answer["answer"], answer["score"]) == (before["answer"], before["score"])
        elif row["kind"] == "row":
            assert row["kv_nbytes"] < 0.5 * row["full_kv_nbytes"]


def test_a_recipe_is_measured_at_its_own_size(tiny: kvzip.LLM, tmp_path: Path) -> None:
    changes = {"tasks": ("niah",), "methods": ("kvzip:small", "kvzip"), "limit": 1}
    header, rows = run(tiny, tmp_path / "rows.jsonl", **changes)
    asked = [row["keep_ratio_asked"] for row in rows if row["kind"] == "row" and row["method"] == "kvzip:small"]
    assert asked == [None]
    assert "kvzip:small" in report_page(header, rows)


def test_a_method_that_decides_how_much_to_keep_is_measured_once(tiny: kvzip.LLM, tmp_path: Path) -> None:
    changes = {"tasks": ("niah",), "methods": ("refreekv:whole_layers=1,threshold=0.2", "kvzip"), "limit": 1}
    header, rows = run(tiny, tmp_path / "rows.jsonl", **changes)
    own = [row for row in rows if row["kind"] == "row" and row["method"].startswith("refreekv")]
    assert [row["keep_ratio_asked"] for row in own] == [None] and 0 < own[0]["keep_ratio"] < 1
    assert len([row for row in rows if row["kind"] == "row" and row["method"] == "kvzip"]) == len(
        SETTINGS["keep_ratios"]
    )
    before = (tmp_path / "rows.jsonl").read_bytes()
    run(tiny, tmp_path / "rows.jsonl", **changes)
    assert (tmp_path / "rows.jsonl").read_bytes() == before, "null is a cell of its own"
    (line,) = [line for line in summarize(rows) if line.method.startswith("refreekv")]
    assert line.keep_ratio_asked is None and line.keep_ratio == own[0]["keep_ratio"]
    failed = [*rows, gap("niah", "refreekv", "x") | {"keep_ratio_asked": None}]
    assert f"{own[0]['keep_ratio']:.3f}" in report_page(header, failed)
    assert len(save_pictures(summarize(failed), failed, tmp_path)) == 3
    assert "| own |" in section(header, failed, {})
    assert less_text(Line("niah", "x", 0.3, nbytes=2.0, full_nbytes=48.0), "float32") == "12.0x"
    assert less_text(Line("niah", "x", 0.3, nbytes=2.0, full_nbytes=48.0), "bfloat16") == "24.0x"
    assert less_text(Line("niah", "x", 0.3), "float32") == "-", "a line without a result"
    (same,) = [found for found in compare(rows, rows) if found.method.startswith("refreekv")]
    assert same.keep_ratio is None and same.change == 0


def test_answers_are_what_the_context_decodes(tiny: kvzip.LLM, whole: tuple[Path, list[dict]]) -> None:
    """Also where they were taken over from the full cache because every token agreed."""
    task = get_task("math-find")
    sample = next(iter(task.samples(_task_settings(tiny))))
    prefilled = tiny.prefill(sample.context, instruction=task.instruction)
    for row in whole[1]:
        if (row["kind"], row["task"], row["sample"]) == ("row", "math-find", 0) and row["method"] in ("full", "random"):
            context = prefilled.compress(kvzip.CompressOptions(keep_ratio=row["keep_ratio_asked"], method="random"))
            for question, answer in zip(sample.questions, row["answers"], strict=True):
                assert str(context.ask(question.text, max_new_tokens=task.max_new_tokens)) == answer["answer"]


def _task_settings(llm: kvzip.LLM) -> Any:
    from kvzip.eval.tasks.base import TaskSettings

    return TaskSettings(SETTINGS["context_len"], lambda text: len(llm.tokenize(text)), SETTINGS["limit"])


def test_a_conversation_holds_the_expected_answers(tiny: kvzip.LLM) -> None:
    """Turn t stands behind t-1 questions and gold answers: it is what a fresh session would be fed."""
    task, questions = get_task("retr-kv"), [Question("who?", ("Ann",)), Question("where?", ("here",)), Question("why?")]
    full = tiny.prefill("The quick brown fox jumps over the lazy dog. " * 4).compress(1.0)
    alone, turns = (ask_full(task, full, questions, mode) for mode in ("multi-request", "multi-turn"))
    assert turns[0].prompt_ids == alone[0].prompt_ids
    history: list[int] = []
    for number, (turn, question) in enumerate(zip(turns, questions, strict=True)):
        history += tiny.question_ids(question.text, first=number == 0)
        assert turn.prompt_ids == history
        assert turn.reference.answer_ids.tolist() == answer_ids(full, history, task.max_new_tokens)
        history += tiny.tokenize(question.golds[0]).tolist() if question.golds else []
    assert alone[2].prompt_ids == tiny.question_ids("why?")
    assert turns[2].question.golds == (turns[2].reference.text,), "no gold answer: the full cache's own is"


def test_questions_are_chosen_all_over() -> None:
    questions = [Question(str(i)) for i in range(10)]
    assert [q.text for q in choose(questions, 3)] == ["0", "3", "6"]
    assert choose(questions, len(questions)) == choose(questions, 99) == questions


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
    hostile = [*rows, gap("t", "<m>", "<b>")]
    page = report_page(header, hostile)
    for task in (*SETTINGS["tasks"], "t"):
        assert f"<h2>{task}</h2>" in page
    assert page.count("<svg") == 5, "curves and kept pairs of two tasks, needles of one"
    assert "&lt;b&gt;" in page and "<b>" not in page
    assert not re.search(r'(src|href)="(?!#|data:)', page), "nothing is loaded"
    assert "<script" not in page


def test_pictures_are_written(whole: tuple[Path, list[dict]], tmp_path: Path) -> None:
    rows = whole[1]
    written = save_pictures(summarize(rows), [*rows, gap("t", "m", "x")], tmp_path / "new")
    names = ["niah-curves", "math-find-curves", "niah-needles", "niah-kept", "math-find-kept"]
    assert [path.stem for path in written] == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def gap(task: str, method: str, reason: str) -> dict:
    return {
        "kind": "gap", "task": task, "sample": 0, "method": method, "keep_ratio_asked": 0.5, "num_questions": 3,
        "reason": reason,
    }  # fmt: skip


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
        "tasks": ("text", "retr-kv", "niah"),
        "methods": ("kvzip-head", "kvzip"),
        "keep_ratios": (0.5,),
        "limit": 1,
    }
    rows = run(tiny, tmp_path / "rows.jsonl", **changes, context_len=60)[1]
    gaps = {(row["task"], row["method"]): row["reason"] for row in rows if row["kind"] == "gap"}
    assert "needs a text" in gaps["text", "full"]
    assert "needs a context of at least" in gaps["retr-kv", "full"]
    assert "kvzip calibrate --method head" in gaps["niah", "kvzip-head"]
    lines = {(line.task, line.method): line for line in summarize(rows)}
    assert lines["niah", "kvzip"].score is not None and lines["niah", "full"].gaps == 0
    failed = lines["niah", "kvzip-head"]
    assert (failed.score, failed.gaps, failed.num_questions, failed.num_asked) == (None, 1, 0, 1)
    page = report_page(*read_rows(tmp_path / "rows.jsonl"))
    assert "<h2>text</h2>" in page and "kvzip calibrate --method head" in page


def asked(sample: int, parts: list[str]) -> dict:
    questions = [{"text": f"q{i}", "gold": "g", "part": part} for i, part in enumerate(parts)]
    return {"kind": "asked", "task": "t", "sample": sample, "about": {}, "questions": questions}


def row(sample: int, method: str, scores: list[float]) -> dict:
    answers = [{"score": s, "kl": 0.5, "same_answer": s == 1} for s in scores]
    sizes = {"keep_ratio": 0.5, "keep_ratio_asked": 0.5, "kv_nbytes": 10, "full_kv_nbytes": 20, "ask_s": 3.0}
    about = {"kind": "row", "task": "t", "sample": sample, "method": method, "reconstruction": None}
    return about | sizes | {"answers": answers}


def test_summaries_by_hand() -> None:
    rows = [asked(0, ["", ""]), asked(1, ["", ""])]
    rows += [row(0, "full", [1, 1]), row(1, "full", [1, 0]), row(0, "m", [1, 0]), row(1, "m", [0, 0])]
    full, method = summarize([*rows, gap("t", "m", "x")])
    assert (full.score, full.relative, full.change) == (0.75, 1.0, 0.0)
    assert (method.score, method.gaps, method.num_contexts, method.num_questions) == (0.25, 1, 2, 4)
    assert method.num_asked == 7 and method.seconds == 1.5
    assert method.relative == pytest.approx(1 / 3)
    assert (method.kl, method.same, method.nbytes, method.full_nbytes) == (0.5, 0.25, 10, 20)
    assert method.error == pytest.approx((0.5**2 + 0.5**2) ** 0.5 / 4)
    assert method.change == pytest.approx(-0.5) and method.change_error == 0, "each context lost one answer of two"


def test_parts_of_a_mixed_task_are_judged_apart() -> None:
    rows = [asked(0, ["kv", "code", "kv"]), row(0, "full", [1, 1, 1]), row(0, "m", [1, 0, 1])]
    assert {(line.task, line.method): (line.score, line.num_questions) for line in summarize(rows)} == {
        ("t/kv", "full"): (1, 2), ("t/code", "full"): (1, 1), ("t/kv", "m"): (1, 2), ("t/code", "m"): (0, 1),
    }  # fmt: skip


def test_runs_are_compared_question_by_question() -> None:
    first = [asked(0, ["", ""]), row(0, "full", [1, 1]), row(0, "m", [1, 0]), asked(1, [""]), row(1, "m", [1])]
    second = [asked(0, ["", ""]), row(0, "m", [1, 1]), asked(1, ["", ""]), row(1, "m", [0, 1]), row(0, "n", [1, 1])]
    (found,) = compare(first, second)
    assert (found.method, found.num_questions) == ("m", 3), "q1 of sample 1 was asked in the second alone"
    assert (found.first, found.second) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert found.change == 0 and found.error == pytest.approx((1 + 1) ** 0.5 / 3)
    with pytest.raises(InputError, match="share no question"):
        compare(first, [asked(0, [""]), row(0, "other", [1])])


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        ({"tasks": ("niahh",)}, UnknownNameError, "did you mean 'niah'"),
        ({"methods": ("kvzipp",)}, UnknownNameError, "did you mean 'kvzip'"),
        ({"keep_ratios": (1.5,)}, BudgetError, "1.5"),
        ({"keep_ratios": ()}, InputError, "nothing to measure"),
        ({"mode": "multi-turns"}, UnknownNameError, "did you mean 'multi-turn'"),
        ({"max_questions": 0}, InputError, "max_questions 0"),
        ({"data": {"nia": "x"}}, UnknownNameError, "did you mean 'niah'"),
        ({"limit": 0}, InputError, "limit 0"),
    ],
)
def test_bad_settings_are_refused_before_any_work(change: dict, error: type, reason: str) -> None:
    with pytest.raises(error, match=reason):
        EvalSettings(**SETTINGS | change)


def test_the_hash_tells_settings_apart() -> None:
    assert hash_of({"a": 1, "b": 2}) == hash_of({"b": 2, "a": 1}) != hash_of({"a": 1, "b": 3})
    json.dumps(hash_of({}))
