"""What generated tasks hold to beyond the first samples: lengths, labels that can be learned, odd answers."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from test_eval_tasks import count_words, settings

from kvzip.errors import InputError
from kvzip.eval.code_similarity import bleu, first_function, same_function
from kvzip.eval.tasks import get_task
from kvzip.eval.tasks.base import Sample
from kvzip.eval.tasks.mix import num_pairs
from kvzip.eval.tasks.repoqa import GAP, MAX_LINES, RepoQA
from kvzip.eval.tasks.retrieval import ANSWER_LEN

FITTED = ["icl-many-shot", "repoqa", "mix-repoqa-kv", "ruler-multikey", "ruler-fwe", "ruler-cwe"]


def labelling(tmp_path: Path, labels: list[object], words: int = 1) -> str:
    """A file with that label for each item; its text is told apart by its first word."""
    path = tmp_path / "labels.jsonl"
    items = [{"text": f"t{i} " + "good " * (i % words + 1), "label": label} for i, label in enumerate(labels)]
    path.write_text("\n".join(map(json.dumps, items)))
    return str(path)


def shown_labels(sample: Sample) -> dict[str, str]:
    return dict(re.findall(r"Example: (\w+) .*\nLabel: \((.)\)", sample.context))


@pytest.mark.parametrize("name", FITTED)
@pytest.mark.parametrize("context_len", [1000, 3000])
def test_every_context_has_the_length_that_was_asked_for(name: str, context_len: int) -> None:
    for sample in get_task(name).samples(settings(context_len, limit=12, seed=3)):
        assert count_words(sample.context) == pytest.approx(context_len, rel=0.1)


@pytest.mark.parametrize("name", ["icl-many-shot", "ruler-multikey", "ruler-fwe", "ruler-cwe"])
def test_long_contexts_do_not_run_out_of_words(name: str) -> None:
    (sample,) = get_task(name).samples(settings(128_000, limit=1))
    assert count_words(sample.context) == pytest.approx(128_000, rel=0.1)


@pytest.mark.parametrize("labels", [[0, *[1] * 59], ["a", "b"] * 30, [i % 26 for i in range(60)], [*"ab", *"c" * 40]])
def test_each_label_that_is_asked_for_is_shown(tmp_path: Path, labels: list[object]) -> None:
    """Also a rare one, and with texts that all end alike."""
    path = labelling(tmp_path, labels)
    for sample in get_task("icl-many-shot").samples(settings(600, limit=10, path=path)):
        shown = shown_labels(sample)
        kinds = {labels[int(text[1:])]: letter for text, letter in shown.items()}
        assert len(kinds) == len(set(labels)) == len(set(kinds.values()))
        assert len({question.text for question in sample.questions}) == 5
        for question in sample.questions:
            text = re.search(r"Example: (\w+) ", question.text)[1]
            assert text not in shown and question.golds == (kinds[labels[int(text[1:])]],)


def test_a_short_file_or_one_of_uneven_texts_still_fills_the_context(tmp_path: Path) -> None:
    path = labelling(tmp_path, [1, 2] * 25, words=40)
    for sample in get_task("icl-many-shot").samples(settings(5000, limit=4, path=path)):
        assert count_words(sample.context) == pytest.approx(5000, rel=0.1)
        assert len(shown_labels(sample)) == 45, "all but the five that are asked for"


@pytest.mark.parametrize("item", ['{"text": " ", "label": 1}', '{"text": "a", "label": null}', '{"text": 3}', "{"])
def test_items_without_a_text_or_a_label_are_refused(tmp_path: Path, item: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(item)
    with pytest.raises(InputError, match=r"bad\.jsonl, line 1: not an object with text and label"):
        next(iter(get_task("icl-many-shot").samples(settings(path=str(path)))))


def test_the_same_text_again_is_no_further_example(tmp_path: Path) -> None:
    path = tmp_path / "same.jsonl"
    path.write_text('{"text": "a", "label": 1}\n{"text": "b", "label": 2}\n' * 30)
    with pytest.raises(InputError, match="60 items with 2 labels, 2 of them different"):
        next(iter(get_task("icl-many-shot").samples(settings(path=str(path)))))


def test_functions_can_be_told_apart_and_repeated() -> None:
    task = get_task("repoqa")
    (sample,) = task.samples(settings(40_000, limit=1))
    golds = sample.questions[0].golds
    assert len(sample.questions) == 5 and len(golds) == len(set(golds)) > 100
    for code in golds:
        assert code.startswith("def ") and code.count("\n") < MAX_LINES and first_function(code) == code
    places = [sample.context.index(question.golds[0]) / len(sample.context) for question in sample.questions]
    assert places == sorted(places) and places[0] < 0.25 and places[-1] > 0.75
    for question in sample.questions:
        assert bleu(question.golds[0], question.golds[0]) == 1.0
        assert task.score(f"```\n{question.golds[0]}\n```", question) == 1.0
        assert task.score(f"```\n{question.golds[1]}\n```", question) == 0.0


def test_few_questions_where_few_functions_fit() -> None:
    codes = [f"def f{i}(a):\n    b = a\n    c = b\n    return c" for i in range(9)]
    functions = {(code, f"Do the thing of number {i}."): count_words(code + GAP) for i, code in enumerate(codes)}
    task, asked = RepoQA(), settings(60)
    sample = task.make(random.Random(0), functions, asked)
    assert 2 <= len(sample.questions) < 5 and count_words(sample.context) <= 60
    with pytest.raises(InputError, match="fewer than two functions fit"):
        task.make(random.Random(0), functions, settings(20))


def test_pairs_stand_evenly_between_functions_and_are_asked_in_turn() -> None:
    assert [num_pairs(n) for n in (800, 16_000, 68_000, 128_000)] == [8, 23, 100, 100]
    (sample,) = get_task("mix-repoqa-kv").samples(settings(30_000, limit=1))
    assert [question.part for question in sample.questions] == ["repoqa", "kv"] * 4
    assert {question.max_new_tokens for question in sample.questions if question.part == "kv"} == {ANSWER_LEN}
    places = [found.start() / len(sample.context) for found in re.finditer(r'^"[\w-]{36}": "', sample.context, re.M)]
    assert len(places) == 44
    assert all(abs(place - (i + 1) / 44) < 0.05 for i, place in enumerate(places))


@pytest.mark.parametrize("text", ["-" * 20_000 + "1", "not " * 5000 + "x", "(" * 3000, "a\x00b", "a." * 9000 + "b"])
def test_answers_that_no_parser_takes_are_wrong(text: str) -> None:
    for answer in (text, f"```python\n{text}\n```"):
        assert same_function(answer, ("def f(a):\n    return a + 1", "def g(a):\n    return a")) == 0.0


def test_the_first_function_is_found_inside_a_class_and_indented() -> None:
    method = "def f(self):\n    return self.a"
    indented = "    def f(self):\n        return self.a"
    assert first_function(f"```python\n{indented}\n```") == method
    assert first_function(f"```\nclass A:\n{indented}\n\ndef g():\n    pass\n```") == method
    assert first_function(f"```\n@property\n{method}\n```") == method
    assert first_function("```\nasync def h(): pass\n```\n```\ndef g(): pass\n```") == "async def h(): pass"


def test_keys_of_needles_are_different_and_asked_once() -> None:
    for sample in get_task("ruler-multikey").samples(settings(4000)):
        keys = Counter(re.findall(r"numbers for ([\w ]+) is:", sample.context))
        assert set(keys.values()) == {1} and len(keys) > 20
        assert len({question.text for question in sample.questions}) == 4


def test_one_chain_of_four_hops() -> None:
    for sample in get_task("ruler-vt").samples(settings()):
        (question,) = sample.questions
        assert len(question.golds) == 5 == len(re.findall(r"VAR \w+ = ", sample.context))
        assert get_task("ruler-vt").score(" ".join(question.golds[:2]), question) == pytest.approx(0.4)
