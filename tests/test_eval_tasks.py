"""Generated tasks can be solved from their context, and not without it."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import SHARED_DATA

from kvzip.errors import InputError, UnknownNameError
from kvzip.eval.tasks import TASKS, get_task
from kvzip.eval.tasks.base import Question, Sample, TaskSettings

GENERATED = ["retr-kv", "retr-prefix-suffix", "retr-multihop", "math-find", "niah"]


def count_words(text: str) -> int:
    return len(re.findall(r"\w+|[^\w\s]", text))


def settings(context_len: int = 1500, limit: int = 3, seed: int = 0, path: str | None = None) -> TaskSettings:
    return TaskSettings(context_len, count_words, limit, seed, path)


def oracle(name: str, sample: Sample, question: Question) -> str:
    """An answer found in the context alone, by a reader who knows the form of the task."""
    text = sample.context
    if name == "retr-kv":
        return json.loads(text)[re.search(r'"(.+?)"', question.text)[1]]
    if name == "retr-prefix-suffix":
        start, end = re.findall(r'"(.+?)"', question.text)
        (found,) = [line for line in text.splitlines() if line.startswith(start) and line.endswith(end)]
        return found
    if name == "retr-multihop":
        value = re.search(r"value (\d+)", question.text)[1]
        held = [value]
        for variable, given in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text):
            if given in held:
                held.append(variable)
        return " ".join(held[1:])
    if name == "math-find":
        numbers = json.loads(text)
        ordered, different = sorted(numbers), sorted(set(numbers))
        for words, value in {
            "second largest": different[-2], "second smallest": different[1], "largest": ordered[-1],
            "smallest": ordered[0], "median": ordered[len(ordered) // 2],
        }.items():  # fmt: skip
            if words in question.text:
                return str(value)
    city = re.search(r"number for (\w+)", question.text)[1]
    return re.search(rf"numbers for {city} is: (\d+)", text)[1]


@pytest.mark.parametrize("name", GENERATED)
def test_a_reader_of_the_context_is_always_right(name: str) -> None:
    task = get_task(name)
    for sample in task.samples(settings()):
        assert sample.questions
        for question in sample.questions:
            assert task.score(oracle(name, sample, question), question) == 1.0


@pytest.mark.parametrize("name", GENERATED)
def test_the_answer_of_another_question_is_wrong(name: str) -> None:
    """Someone who knows the form of the answers but not the context scores at chance, which is nearly nothing."""
    task = get_task(name)
    samples = list(task.samples(settings(limit=12)))
    scores = [
        task.score(" ".join(other.golds), question)
        for sample, wrong in pairwise(samples)
        for question in sample.questions
        for other in wrong.questions
        if name != "math-find" or other.text != question.text  # extremes of long lists are alike
    ]
    assert sum(scores) / len(scores) < 0.05


@pytest.mark.parametrize("name", GENERATED)
@pytest.mark.parametrize("context_len", [800, 4000])
def test_contexts_have_the_length_that_was_asked_for(name: str, context_len: int) -> None:
    for sample in get_task(name).samples(settings(context_len, limit=2)):
        assert abs(count_words(sample.context) - context_len) < 0.1 * context_len


@pytest.mark.parametrize("name", GENERATED)
def test_samples_depend_on_the_seed_alone(name: str) -> None:
    task = get_task(name)
    first, again, other = (list(task.samples(settings(seed=seed))) for seed in (0, 0, 1))
    assert first == again != other
    assert list(task.samples(settings(limit=2))) == first[:2], "more samples must not change the first ones"
    assert len({sample.context for sample in first}) == 3


def test_needles_stand_at_every_depth() -> None:
    samples = list(get_task("niah").samples(settings(limit=11)))
    assert [sample.about["depth"] for sample in samples] == [i / 10 for i in range(11)]
    for sample in samples:
        place = sample.context.index("One of the special") / len(sample.context)
        assert place == pytest.approx(sample.about["depth"], abs=0.05)


def test_questions_are_asked_at_all_depths() -> None:
    (sample,) = get_task("retr-kv").samples(settings(4000, limit=1))
    places = [sample.context.index(question.golds[0]) / len(sample.context) for question in sample.questions]
    assert [int(5 * place) for place in places] == [0, 1, 2, 3, 4]


def test_a_context_that_is_too_short_for_the_task_is_refused() -> None:
    with pytest.raises(InputError, match="'retr-kv' needs a context of at least"):
        next(iter(get_task("retr-kv").samples(settings(20))))


def test_squad_joins_paragraphs_and_keeps_their_questions(tmp_path: Path) -> None:
    paragraphs = [
        {
            "context": f"Tower {i} was built by Mason{i} of stone, brick and much else that was at hand there.",
            "qas": [
                {"question": f"Who built tower {i}?", "answers": [{"text": f"Mason{i}"}, {"text": f"Mason{i}"}]},
                {"question": "Who painted it?", "answers": [], "is_impossible": True},
            ],
        }
        for i in range(9)
    ]
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": [{"paragraphs": paragraphs[:5]}, {"paragraphs": paragraphs[5:]}]}))
    task = get_task("squad")
    samples = list(task.samples(settings(40, limit=9, path=str(path))))
    assert [len(sample.questions) for sample in samples] == [2, 2, 2, 2, 1]
    for sample in samples:
        assert count_words(sample.context) <= 40
        for question in sample.questions:
            assert len(question.golds) == 1 and question.golds[0] in sample.context
            assert task.score(f"It was {question.golds[0]}.", question) == 1.0
            assert task.score("It was Mason99.", question) == 0.0
    assert len(list(task.samples(settings(40, limit=2, path=str(path))))) == 2


def test_gsm8k_asks_for_what_the_last_sentence_asks(tmp_path: Path) -> None:
    long = "Ann has 3 apples. " * 20
    problems = [
        {"question": f"{long}Bob gives her 2.5 more, e.g. today. How many apples has she?", "answer": "3+2=5\n#### 5"},
        {"question": "Too short. How many?", "answer": "#### 1"},
        {"question": f"{long}Bob asks: how many are there?", "answer": "60\n#### 1,060"},
    ]
    path = tmp_path / "gsm.jsonl"
    path.write_text("\n".join(map(json.dumps, problems)) + "\n")
    task = get_task("gsm8k")
    first, second = task.samples(settings(path=str(path)))
    assert first.questions[0].text == "How many apples has she?" and first.context.endswith("e.g. today.")
    assert second.questions[0].text == "Bob asks: how many are there?"
    assert task.score("So the answer is 1060.", second.questions[0]) == 1.0
    path.write_text("{}\n")
    with pytest.raises(InputError, match="is not GSM8K as JSON lines"):
        list(task.samples(settings(path=str(path))))


def test_shared_data_is_read(articles: list[dict]) -> None:
    """The real files: every gold answer of SQuAD stands in its context, every problem has a number for a result."""
    for sample in get_task("squad").samples(settings(1500, limit=20, path=str(SHARED_DATA / "xquad.en.dev.json"))):
        assert all(any(gold in sample.context for gold in question.golds) for question in sample.questions)
        assert len(sample.questions) > 10
    samples = list(get_task("gsm8k").samples(settings(path=str(SHARED_DATA / "gsm8k.test.first300.jsonl"), limit=300)))
    assert len(samples) > 15
    for sample in samples:
        (question,) = sample.questions
        assert get_task("gsm8k").score(f"The answer is {question.golds[0]}.", question) == 1.0


@pytest.mark.parametrize("content", ["{", "[]", '{"data": [{"paragraphs": [{"context": "x"}]}]}', '{"data": 3}'])
def test_files_that_are_not_squad_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"bad\.json is not a SQuAD JSON file"):
        list(get_task("squad").samples(settings(path=str(path))))
    with pytest.raises(InputError, match="needs a SQuAD JSON file"):
        list(get_task("squad").samples(settings()))
    with pytest.raises(InputError, match="can't be read as UTF-8"):
        list(get_task("squad").samples(settings(path=str(tmp_path / "none.json"))))


def test_tasks_say_where_they_come_from() -> None:
    for name in TASKS:
        task = get_task(name)
        assert task.name == name and task.version >= 1
        assert task.source and task.licence and task.metric and (task.__doc__ or "").strip()
    with pytest.raises(UnknownNameError, match="did you mean 'retr-kv'"):
        get_task("retr-kw")
