"""Generated tasks can be solved from their context, and not without it."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import SHARED_DATA

from kvzip.errors import InputError, UnknownNameError
from kvzip.eval.code_similarity import bleu, first_function, same_function
from kvzip.eval.tasks import TASKS, get_task
from kvzip.eval.tasks.base import Question, Sample, TaskSettings
from kvzip.eval.tasks.words import CATEGORIES

GENERATED = [
    "retr-kv", "retr-prefix-suffix", "retr-multihop", "math-find", "niah", "icl-many-shot", "repoqa", "mix-repoqa-kv",
    "ruler-multikey", "ruler-vt", "ruler-fwe", "ruler-cwe",
]  # fmt: skip
CHANCE = {"icl-many-shot": 1 / 6}  # of someone who knows the form of the answers but not the context; else nothing


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
    if name in ("retr-multihop", "ruler-vt"):
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
    if name == "icl-many-shot":
        thing = re.search(r"Example: .*?(\w+)\n", question.text)[1]
        (kind,) = [words.split() for words in CATEGORIES.values() if thing in words.split()]
        assert thing not in text.split()
        return next(letter for word, letter in re.findall(r"(\w+)\nLabel: (\(.\))", text) if word in kind)
    if question.text.startswith("Key:"):
        return re.search(re.escape(question.text.split("\n")[0][5:]) + ': "(.+?)"', text)[1]
    if name in ("repoqa", "mix-repoqa-kv"):
        assert question.golds[0] in text
        return f"Here it is:\n```python\n{question.golds[0]}\n```"
    if name == "ruler-fwe":
        return " ".join(word for word, _ in Counter(text.split()).most_common(4) if word != "...")
    if name == "ruler-cwe":
        return ", ".join(word for word, _ in Counter(re.findall(r"[a-z]+", text)).most_common(10))
    key = re.search(r"number for ([\w ]+) mentioned", question.text)[1]
    return re.search(rf"numbers for {key} is: (\d+)", text)[1]


@pytest.mark.parametrize("name", GENERATED)
def test_a_reader_of_the_context_is_always_right(name: str) -> None:
    task = get_task(name)
    for sample in task.samples(settings()):
        assert sample.questions
        for question in sample.questions:
            assert task.score(oracle(name, sample, question), question) == 1.0


@pytest.mark.parametrize("name", GENERATED)
def test_the_answer_of_another_question_is_wrong(name: str) -> None:
    """Someone who knows the form of the answers but not the context scores at chance."""
    task = get_task(name)
    samples = list(task.samples(settings(limit=3 if "repoqa" in name else 12)))
    scores = [
        task.score(task.gold_answer(other), question)
        for sample, wrong in pairwise(samples)
        for question in sample.questions
        for other in wrong.questions
        if name != "math-find" or other.text != question.text  # extremes of long lists are alike
    ]
    chance = CHANCE.get(name, 0)
    assert chance - 0.1 <= sum(scores) / len(scores) < chance + 0.1


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


def test_needles_stand_at_every_depth_and_length() -> None:
    samples = list(get_task("niah").samples(settings(limit=33)))
    assert [sample.about["depth"] for sample in samples] == 3 * [i / 10 for i in range(11)]
    assert [sample.about["context_len"] for sample in samples] == 11 * [1500] + 11 * [750] + 11 * [375]
    for sample in samples:
        assert count_words(sample.context) == pytest.approx(sample.about["context_len"], rel=0.1)
        place = sample.context.index("One of the special") / len(sample.context)
        assert place == pytest.approx(sample.about["depth"], abs=0.05)


def test_questions_are_asked_at_all_depths() -> None:
    (sample,) = get_task("retr-kv").samples(settings(4000, limit=1))
    places = [sample.context.index(question.golds[0]) / len(sample.context) for question in sample.questions]
    assert [int(5 * place) for place in places] == [0, 1, 2, 3, 4]


def test_counts_of_words_leave_no_doubt_about_the_answer() -> None:
    for sample in get_task("ruler-fwe").samples(settings()):
        counts = [count for _, count in Counter(sample.context.split()).most_common(5)]
        assert counts == sorted(set(counts), reverse=True), "no two of the first five come equally often"
    for sample in get_task("ruler-cwe").samples(settings()):
        counts = [count for _, count in Counter(re.findall("[a-z]+", sample.context)).most_common(11)]
        assert len(set(counts[:10])) == 1 and counts[0] >= 10 * counts[10]


def test_a_labelling_of_the_user(tmp_path: Path) -> None:
    items = [{"text": f"thing {i}", "label": ["low", "high"][i > 30]} for i in range(60)]
    path = tmp_path / "labels.jsonl"
    path.write_text("\n".join(map(json.dumps, items)) + "\n")
    (sample,) = get_task("icl-many-shot").samples(settings(300, limit=1, path=str(path)))
    shown = {int(n): letter for n, letter in re.findall(r"thing (\d+)\nLabel: \((.)\)", sample.context)}
    assert len({shown[n] for n in shown if n > 30}) == len({shown[n] for n in shown if n <= 30}) == 1
    for question in sample.questions:
        asked = int(re.search(r"thing (\d+)", question.text)[1])
        assert asked not in shown
        assert question.golds == (next(letter for n, letter in shown.items() if (n > 30) == (asked > 30)),)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"text": "a"}\n', "line 1: not an object with text and label"),
        ("[]\n", "line 1: not an object"),
        ('{"text": "a", "label": 1}\n' * 50, "50 items with 1 labels"),
        ('{"text": "a", "label": 1}\n{"text": "b", "label": 2}\n', "2 items with 2 labels"),
    ],
)
def test_files_that_are_no_labelling_are_refused(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=reason):
        next(iter(get_task("icl-many-shot").samples(settings(path=str(path)))))


def test_functions_come_from_any_package(tmp_path: Path) -> None:
    body = "\n".join(f"    a{{0}} = {i} + b  # line {i}" for i in range(4))
    code = '    """Return the sum of name{0} and all that stands before it.\n\n    More.\n    """\n'
    source = "\n\n".join(f"def name{i}(b):\n{code}{body}\n    return a{{0}}".replace("{0}", str(i)) for i in range(30))
    (tmp_path / "broken.py").write_text("def (:")
    (tmp_path / "good.py").write_text(source)
    (sample,) = get_task("repoqa").samples(settings(300, limit=1, path=str(tmp_path)))
    assert '"""' not in sample.context and "def name" in sample.context
    for question in sample.questions:
        name = re.match(r"def (\w+)", question.golds[0])[1]
        assert name not in question.text and "Return the sum of it and all that stands before it." in question.text
        assert question.golds[0] in sample.context and "More." not in question.text
    for path, reason in (
        ("no.such.package", "no installed package"),
        (str(tmp_path / "broken.py"), "has 0 documented"),
    ):
        with pytest.raises(InputError, match=reason):
            next(iter(get_task("repoqa").samples(settings(300, path=path))))
    with pytest.raises(InputError, match=r"30 documented functions .* 9000 are needed"):
        next(iter(get_task("repoqa").samples(settings(9000, path=str(tmp_path)))))


def test_likeness_of_functions() -> None:
    asked = "def add(a, b):\n    total = a + b\n    return total  # the sum of the two"
    other = "def sub(a, b):\n    total = a - b\n    return total  # the difference of them"
    golds = (asked, other)
    assert bleu(asked, asked) == 1.0 and bleu("", asked) == bleu(asked, "") == 0.0
    assert same_function(asked, golds) == same_function(f"Sure:\n```python\n{asked}\n```\nDone.", golds) == 1.0
    assert same_function(f"```\nimport os\n\n{asked}\n\nprint(1)\n```", golds) == 1.0, "the function alone counts"
    assert same_function(f"```python\n{asked}", golds) == 1.0, "a block that was cut off"
    assert same_function(other, golds) == 0.0, "another function of the code"
    assert same_function(asked.replace("total = a + b", "return a"), golds) == 0.0, "not alike enough"
    assert same_function("", golds) == same_function("I can't tell.", golds) == 0.0
    assert first_function("x = (") == "x = (" and first_function("```\na = 1\n```") == "a = 1"


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
    with pytest.raises(InputError, match="can't be read as UTF-8"):
        list(get_task("squad").samples(settings(path=str(tmp_path / "none.json"))))


def test_tasks_say_where_they_come_from() -> None:
    for name in TASKS:
        task = get_task(name)
        assert task.name == name and task.version >= 1
        assert task.source and task.licence and task.metric and (task.__doc__ or "").strip()
    with pytest.raises(UnknownNameError, match="did you mean 'retr-kv'"):
        get_task("retr-kw")
