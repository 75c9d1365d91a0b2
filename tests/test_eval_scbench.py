"""The published data sets, read from local copies in the form of the hub: the hub itself is never asked here."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kvzip.errors import InputError, MissingExtraError
from kvzip.eval.tasks import get_task, hub
from kvzip.eval.tasks.base import Question, Sample, TaskSettings
from kvzip.eval.tasks.scbench import CONFIGS, cut_middle

FUNCTIONS = [
    "def area(width, height):\n    if width < 0 or height < 0:\n        raise ValueError(width, height)\n    return width * height",
    "def greet(people):\n    for person in sorted(people, key=str.lower):\n        print('Hello', person, '!')\n    return len(people)",
    "def load(path, mode='r'):\n    with open(path, mode) as file:\n        lines = file.readlines()\n    return [line for line in lines if line.strip()]",
    "async def poll(queue, timeout):\n    while not queue.closed:\n        item = await queue.get(timeout=timeout)\n        yield item\n    queue.task_done()",
]
SUMMARIES = [
    "We measure how long ice lasts on lakes.\nThaw comes nine days earlier than before.",
    "A compiler for quantum circuits is described here.\nIts output has fewer gates.",
    "Bees find flowers by smell first.\nColour matters only near them.",
    "Old manuscripts were scanned under ultraviolet light.\nErased names became readable again.",
]


def turns_of(config: str, i: int) -> list[dict[str, Any]]:
    """Two turns of sample `i`, as on the hub."""
    repoqa = [{"input": f"It does thing {j}.", "answer": FUNCTIONS[2 * i + j], "name": f"f{i}{j}"} for j in (0, 1)]
    kv = [{"input": f'Key: "k{i}{j}"\nValue:', "answer": f"f3a{i}-{j}7c"} for j in (0, 1)]
    summary = [{"input": f"Summarize paper {j}.", "answer": SUMMARIES[2 * i + j]} for j in (0, 1)]
    if config in ("scbench_kv", "scbench_prefix_suffix"):
        return kv
    if config == "scbench_vt":
        return [
            {"input": f"Find all variables of {j}.", "answer": [f"ABCD{'EFGH'[2 * i + j]}", f"QRST{'UVWX'[2 * i + j]}"]}
            for j in (0, 1)
        ]
    if config == "scbench_repoqa":
        return repoqa
    if config == "scbench_qa_eng":
        return [
            {"input": f"Who is number {j}?", "answer": ["Ishmael", "Queequeg", "Dorothea", "Casaubon"][2 * i + j]}
            for j in (0, 1)
        ]
    if config == "scbench_qa_chn":
        return [
            {"input": f"第{j}个人是谁？", "answer": ["孙少平", "田润叶", "白嘉轩", "鹿子霖"][2 * i + j]} for j in (0, 1)
        ]
    if config == "scbench_choice_eng":
        options = [["Ann", "Bob", "Cid", "Dan"], ["Eve", "Flo", "Gus", "Hal"]][i]
        return [{"input": f"Who is number {j}?", "answer": options[i + 2 * j], "options": options} for j in (0, 1)]
    if config == "scbench_mf":
        return [
            {"input": f"Answer with one number. The {n} number of the list is:", "answer": 100 * (i + 1) + j}
            for j, n in enumerate(("Largest", "second smallest"))
        ]
    if config == "scbench_many_shot":
        return [
            {
                "input": f"What day is it, {j}?\nOptions:\n(A) 01/0{i}/2020\n(B) 02/1{i}/2021\nAnswer:",
                "answer": "AB"[(i + j) % 2],
            }
            for j in (0, 1)
        ]
    if config == "scbench_summary":
        return summary
    if config == "scbench_summary_with_needles":
        needle = {"input": "What is the pass key?", "answer": f"{i + 1}4711", "task": "scbench_passkey"}
        return [{**summary[0], "task": "scbench_summary"}, needle]
    return [{**repoqa[0], "task": "scbench_repoqa"}, {**kv[0], "name": None, "task": "scbench_kv"}]


def rows_of(config: str) -> list[dict[str, Any]]:
    context = "Something long is told here, and more. " * 9
    found = [{"id": i, "context": f"{i}. {context}", "multi_turns": turns_of(config, i)} for i in (0, 1)]
    for i, row in enumerate(found):
        if config == "scbench_mf":
            row["context"] = [100 * (i + 1) + j for j in range(30)]
        if config == "scbench_vt":
            row["input"] = row.pop("context")
        if "repoqa" in config:
            row.update(lang="python", repo=f"someone/r{i}")
    return found


def columns(turns: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {key: [turn.get(key) for turn in turns] for key in turns[0]}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(rows), path)
    else:
        import datasets

        datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)}).save_to_disk(str(path))
    return str(path)


def count_words(text: str) -> int:
    return len(re.findall(r"\w+|[^\w\s]", text))


def settings(path: str | None, context_len: int = 500, limit: int = 9) -> TaskSettings:
    return TaskSettings(context_len, count_words, limit, path=path)


def samples_of(config: str, path: str | None, **kwargs: Any) -> list[Sample]:
    return list(get_task(config.replace("_", "-")).samples(settings(path, **kwargs)))


@pytest.fixture(params=["jsonl", "json", "parquet", "folder", "struct"])
def form(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("config", CONFIGS)
def test_every_form_of_a_copy_gives_the_same_samples(tmp_path: Path, config: str, form: str) -> None:
    rows = rows_of(config)
    known = samples_of(config, write(tmp_path / "known.jsonl", rows))
    if config == "scbench_summary_with_needles":  # parquet has one type a column
        assert all(isinstance(turn["answer"], str) for row in rows for turn in row["multi_turns"])
    if form == "struct":
        rows = [{**row, "multi_turns": columns(row["multi_turns"])} for row in rows]
        found = samples_of(config, write(tmp_path / "copy.parquet", rows))
    else:
        found = samples_of(config, write(tmp_path / ("copy" if form == "folder" else f"copy.{form}"), rows))
    assert found == known and len(found) == 2
    for sample, row in zip(found, rows, strict=True):
        assert sample.context == str(row.get("context") or row["input"])
        assert sample.about == {"truncated": False, "id": row["id"]} and len(sample.questions) == 2


@pytest.mark.parametrize("config", CONFIGS)
def test_gold_is_right_and_that_of_another_sample_wrong(tmp_path: Path, config: str) -> None:
    task = get_task(config.replace("_", "-"))
    first, second = samples_of(config, write(tmp_path / "copy.jsonl", rows_of(config)))
    for question, other in zip(first.questions, second.questions, strict=True):
        assert task.score(task.gold_answer(question), question) == 1.0
        assert task.score(task.gold_answer(other), question) < 0.2
        assert task.score("", question) == 0.0
        assert question.max_new_tokens is None or question.part
        assert question.part in task.parts and other.part == question.part  # type: ignore[attr-defined]


def test_all_twelve_are_registered() -> None:
    assert len(CONFIGS) == 12
    tokens = {config: get_task(config.replace("_", "-")).max_new_tokens for config in CONFIGS}
    assert tokens == {
        "scbench_kv": 150, "scbench_prefix_suffix": 150, "scbench_vt": 30, "scbench_repoqa": 1024, "scbench_qa_eng": 40,
        "scbench_qa_chn": 40, "scbench_choice_eng": 40, "scbench_mf": 5, "scbench_many_shot": 10, "scbench_summary": 200,
        "scbench_summary_with_needles": 800, "scbench_repoqa_and_kv": 1024,
    }  # fmt: skip
    for config in CONFIGS:
        task = get_task(config.replace("_", "-"))
        assert task.licence == "MIT" and task.instruction and task.reads and task.name == config.replace("_", "-")


def test_parts_of_mixed_sets_are_judged_apart(tmp_path: Path) -> None:
    sample = samples_of(
        "scbench_summary_with_needles", write(tmp_path / "a.jsonl", rows_of("scbench_summary_with_needles"))
    )[0]
    assert [(q.part, q.max_new_tokens) for q in sample.questions] == [("summary", 800), ("passkey", 15)]
    task = get_task("scbench-summary-with-needles")
    assert task.score("The pass key is 14711.", sample.questions[1]) == 1.0
    assert task.score("147110", sample.questions[1]) == 0.0
    sample = samples_of("scbench_repoqa_and_kv", write(tmp_path / "b.jsonl", rows_of("scbench_repoqa_and_kv")))[0]
    assert [(q.part, q.max_new_tokens) for q in sample.questions] == [("repoqa", 1024), ("kv", 80)]
    assert get_task("scbench-repoqa-and-kv").score("It is f3a0-07c.", sample.questions[1]) == 1.0


def test_questions_show_what_is_asked(tmp_path: Path) -> None:
    choice = samples_of("scbench_choice_eng", write(tmp_path / "a.jsonl", rows_of("scbench_choice_eng")))[0].questions[
        0
    ]
    assert choice.text == "Who is number 0?\nA. Ann\nB. Bob\nC. Cid\nD. Dan"
    assert choice.golds == ("A", "Ann", "Bob", "Cid", "Dan")
    found = samples_of("scbench_mf", write(tmp_path / "b.jsonl", rows_of("scbench_mf")))[0].questions
    assert found[0].text.startswith("What is the largest number of the list?\n\nAnswer with one number.")
    assert found[1].text.startswith("What is the second smallest number of the list?")  # not that of another turn
    shot = samples_of("scbench_many_shot", write(tmp_path / "c.jsonl", rows_of("scbench_many_shot")))[1].questions[0]
    assert shot.golds == ("B", "02/11/2021", "01/01/2020")


def test_a_repoqa_answer_is_compared_with_the_functions_of_its_repository(tmp_path: Path) -> None:
    """Those of rows beyond the limit too, and none of another repository."""
    rows = rows_of("scbench_repoqa")
    third = {**rows[1], "repo": rows[0]["repo"], "multi_turns": [*rows[1]["multi_turns"], rows[0]["multi_turns"][0]]}
    (sample,) = samples_of("scbench_repoqa", write(tmp_path / "a.jsonl", [*rows, third]), limit=1)
    assert [set(q.golds) for q in sample.questions] == [set(FUNCTIONS)] * 2
    assert [q.golds[0] for q in sample.questions] == FUNCTIONS[:2]
    second = samples_of("scbench_repoqa", str(tmp_path / "a.jsonl"))[1]
    assert second.questions[0].golds == (FUNCTIONS[2], FUNCTIONS[3])
    task = get_task("scbench-repoqa")
    assert task.score(f"Here it is:\n```python\n{FUNCTIONS[0]}\n```\nIt multiplies.", sample.questions[0]) == 1.0
    assert task.score(f"```python\n{FUNCTIONS[1]}\n```", sample.questions[0]) == 0.0


@pytest.mark.parametrize(
    ("config", "answer", "prediction", "expected"),
    [
        ("scbench_many_shot", "A", "a banana", 0.0),  # published: the label is gone through by character, in any case
        ("scbench_many_shot", "A", "(A)", 1.0),
        ("scbench_many_shot", "(A)", "A", 1.0),
        ("scbench_many_shot", "A", "01/00/2020", 1.0),
        ("scbench_many_shot", "A", "02/10/2021 or 01/00/2020", 0.0),
        ("scbench_qa_chn", "孙少平", "少", 0.5),  # 2 * 1 / (1 + 3); published: 1, for the character alone
        ("scbench_qa_chn", "孙少平", "孙少平。", 1.0),  # published: 0.5, for each character alone
        ("scbench_qa_chn", ["孙少平", "少平"], "少平", 1.0),
        ("scbench_qa_eng", "Moby Dick", "it was MOBY DICK, a whale", 1.0),
        ("scbench_qa_eng", ["Ahab", "the captain"], "The Captain", 1.0),
        ("scbench_qa_eng", "Moby Dick", "Moby", 0.0),
        ("scbench_choice_eng", "Bob", "Because Ann says so, it is Bob", 0.0),  # published: the B of Because; two are named
        ("scbench_choice_eng", "Dan", "Dorothy", 0.0),  # published: the D of Dorothy
        ("scbench_choice_eng", "Bob", "B. Bob", 1.0),
        ("scbench_choice_eng", ["Bob", "B"], "The correct answer is B", 1.0),
        ("scbench_choice_eng", "C", "Cid", 1.0),
        ("scbench_mf", 999, "999.", 1.0),
        ("scbench_mf", 999.0, "999", 1.0),
        ("scbench_mf", "99", "999", 0.0),
        ("scbench_vt", ["ABCDE", "FGHIJ", "KLMNO"], "abcde, KLMNOP", 1 / 3),  # published: 0.67, and rounded
        ("scbench_vt", "ABCDE, FGHIJ", "VAR FGHIJ and VAR ABCDE", 1.0),
        ("scbench_kv", "ab-12", "AB-12", 0.0),
        ("scbench_kv", "ab-12", 'The value is "ab-12".', 1.0),
        ("scbench_summary", "one two\nthree four", "one two\nthree five", 0.75),
    ],
)  # fmt: skip
def test_traps(tmp_path: Path, config: str, answer: Any, prediction: str, expected: float) -> None:
    row = rows_of(config)[0]
    row["multi_turns"][0]["answer"] = answer
    question = samples_of(config, write(tmp_path / "copy.jsonl", [row]))[0].questions[0]
    assert get_task(config.replace("_", "-")).score(prediction, question) == pytest.approx(expected)


def test_long_contexts_lose_their_middle(tmp_path: Path) -> None:
    row = rows_of("scbench_kv")[0]
    row["context"] = " ".join(f"w{i}" for i in range(20_000))
    (sample,) = samples_of("scbench_kv", write(tmp_path / "copy.jsonl", [row]), context_len=1000)
    assert sample.about["truncated"] is True
    assert 0.99 * 1000 <= count_words(sample.context) <= 1000
    assert sample.context.startswith("w0 w1 w2 ") and sample.context.endswith(" w19998 w19999")
    half = len(sample.context) // 2
    assert row["context"].startswith(sample.context[:half]) and row["context"].endswith(sample.context[half:])


@pytest.mark.parametrize(("length", "expected"), [(9, "abcdefghi"), (4, "abhi"), (5, "abghi"), (1, "i"), (0, "")])
def test_both_ends_stay(length: int, expected: str) -> None:
    assert cut_middle("abcdefghi", length, len) == expected


def _set(key: str, value: Any) -> Any:
    return lambda row: row["multi_turns"][0].__setitem__(key, value)


@pytest.mark.parametrize(
    ("config", "spoil", "message"),
    [
        ("scbench_kv", lambda row: row.pop("context"), "row 2: it has no context"),
        ("scbench_kv", lambda row: row.update(context=3), "row 2: it has no context"),
        ("scbench_kv", lambda row: row.pop("multi_turns"), "row 2: its multi_turns are not a list of turns"),
        ("scbench_kv", lambda row: row.update(multi_turns=[]), "row 2: its multi_turns are not a list of turns"),
        ("scbench_kv", lambda row: row.update(multi_turns={"input": "x"}), "row 2: its multi_turns are not lists"),
        ("scbench_kv", lambda row: row.update(multi_turns={"input": ["x"], "answer": []}), "row 2: the lists .* differ in length"),
        ("scbench_kv", _set("input", None), "row 2: turn 1 has no text as its input"),
        ("scbench_kv", _set("answer", None), "row 2: turn 1 has no answer"),
        ("scbench_kv", _set("answer", " "), "row 2: turn 1 has no answer"),
        ("scbench_vt", _set("answer", []), "row 2: turn 1 has no answer"),
        ("scbench_repoqa", _set("answer", {"text": "x"}), "row 2: turn 1 has no answer"),
        ("scbench_choice_eng", _set("answer", "Zoe"), "row 2: the answer of turn 1, 'Zoe', is none of its options"),
        ("scbench_choice_eng", _set("options", "ABCD"), "row 2: the options of turn 1 are not a list of texts"),
        ("scbench_many_shot", _set("answer", "C"), "row 2: the answer of turn 1, 'C', is none of its options"),
        ("scbench_repoqa_and_kv", _set("task", "scbench_mf"), "row 2: turn 1 has task 'scbench_mf': known: repoqa, kv"),
        ("scbench_summary_with_needles", _set("task", None), "row 2: turn 1 has task None: known: summary, passkey"),
    ],
)  # fmt: skip
def test_malformed_rows_are_named(tmp_path: Path, config: str, spoil: Any, message: str) -> None:
    rows = rows_of(config)
    spoil(rows[1])
    with pytest.raises(InputError, match=message) as caught:
        samples_of(config, write(tmp_path / "copy.jsonl", rows))
    assert "\n" not in str(caught.value) and config in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("none.jsonl", None, "there is no such file or folder"),
        ("bad.jsonl", b"{", "Expecting property name"),
        ("bad.json", b"[1]", "it is no list of objects"),
        ("empty.jsonl", b"", "it is no list of objects"),
        ("latin.jsonl", b'{"context": "\xe9"}', "can't be read as UTF-8"),
        ("bad.parquet", b"PAR1", "Parquet"),
        ("copy.csv", b"a,b", "unknown ending '.csv'"),
    ],
)
def test_files_that_are_no_copy_are_refused(tmp_path: Path, name: str, content: bytes | None, reason: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{re.escape(name)} can't be read as a data set .*{reason}") as caught:
        samples_of("scbench_kv", str(tmp_path / name))
    assert "give --data scbench-kv=FILE with a local copy" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="can't be read as a data set"):
        samples_of("scbench_kv", str(tmp_path))


def test_without_the_library_only_json_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = write(tmp_path / "copy.parquet", rows_of("scbench_kv"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    for path in (copy, None):
        with pytest.raises(MissingExtraError, match=r"datasets is not installed: pip install 'kvzip\[eval\]'"):
            samples_of("scbench_kv", path)
    assert len(samples_of("scbench_kv", write(tmp_path / "copy.jsonl", rows_of("scbench_kv")))) == 2


def test_the_hub_is_asked_by_name_and_quietly(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import datasets
    from huggingface_hub.utils import are_progress_bars_disabled

    asked: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        asked.append((*args, kwargs["split"], datasets.config.HF_HUB_OFFLINE, are_progress_bars_disabled()))
        return datasets.Dataset.from_list(rows_of("scbench_kv"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    before = datasets.config.HF_HUB_OFFLINE, are_progress_bars_disabled(), datasets.are_progress_bars_disabled()
    for answers in (True, False):  # where it does not answer, the library's cache is all there is
        monkeypatch.setattr(hub, "_answers", lambda repo, answers=answers: answers)
        assert len(samples_of("scbench_kv", None)) == 2
    assert asked == [
        ("microsoft/SCBench", "scbench_kv", "test", before[0] or offline, True) for offline in (False, True)
    ]
    assert before == (
        datasets.config.HF_HUB_OFFLINE,
        are_progress_bars_disabled(),
        datasets.are_progress_bars_disabled(),
    )
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("task", ["scbench-kv", "squad", "gsm8k"])
def test_a_hub_out_of_reach_shows_at_once(tmp_path: Path, task: str) -> None:
    code = (
        "from kvzip.errors import InputError\nfrom kvzip.eval.tasks import get_task\n"
        "from kvzip.eval.tasks.base import TaskSettings\n"
        f"try:\n    list(get_task({task!r}).samples(TaskSettings(100, len, 1)))\n"
        "except InputError as error:\n    print(error)\n"
    )
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "PATH": "/usr/bin", "OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=True)
    assert time.monotonic() - start < 30
    assert done.stderr == "" and done.stdout.count("\n") == 1
    assert "can't be read as a data set (the hub can't be reached): " in done.stdout
    assert f"give --data {task}=FILE with a local copy" in done.stdout


def test_squad_and_gsm8k_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    squad = [
        {"context": f"Tower {i} was built by Mason{i}.", "question": f"Who, {q}?", "answers": {"text": [f"Mason{i}"], "answer_start": [0]}}
        for i, q in ((0, "a"), (1, "a"), (0, "b"), (2, "a"))
    ]  # fmt: skip
    gsm8k = [{"question": "Ann has 3 apples. " * 20 + "How many?", "answer": "#### 3"}]
    sets = {("rajpurkar/squad", None, "train"): squad, ("openai/gsm8k", "main", "test"): gsm8k}
    for module in ("squad", "gsm8k"):
        monkeypatch.setattr(
            f"kvzip.eval.tasks.{module}.rows", lambda repo, config, split, path, task: sets[repo, config, split]
        )
    first, second = get_task("squad").samples(settings(None, context_len=15))
    assert first.context == "Tower 0 was built by Mason0.\n\nTower 1 was built by Mason1."
    assert [q.text for q in first.questions] == ["Who, a?", "Who, b?", "Who, a?"]
    assert second.questions == (Question("Who, a?", ("Mason2",)),)
    (problem,) = get_task("gsm8k").samples(settings(None))
    assert problem.questions == (Question("How many?", ("3",)),)
