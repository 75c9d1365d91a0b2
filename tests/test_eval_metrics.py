"""Every metric against cases worked out by hand, those that published scorers get wrong among them."""

from __future__ import annotations

import math
import sys

import pytest

from kvzip.errors import MissingExtraError
from kvzip.eval import metrics


@pytest.mark.parametrize(
    ("metric", "prediction", "golds", "expected"),
    [
        ("contains", "The value is ab-12.", ["ab-12"], 1.0),
        ("contains", "The value is AB-12.", ["ab-12"], 0.0),
        ("contains", "", ["ab-12"], 0.0),
        ("contains", "second", ["first", "second"], 1.0),
        ("fraction_found", "abcde and FGHIJ", ["ABCDE", "FGHIJ", "KLMNO"], 2 / 3),
        ("fraction_found", "ABCDEF", ["ABCDE"], 0.0),  # a longer word is another variable
        ("first_number", "It is 42, not 43.", ["42"], 1.0),
        ("first_number", "It is 43, not 42.", ["42"], 0.0),
        ("first_number", "1,234 apples", ["1234"], 1.0),
        ("first_number", "-5", ["5"], 0.0),
        ("first_number", "none", ["5"], 0.0),
        ("stated_number", "3 + 4 = 7. The answer is $7.", ["7"], 1.0),
        ("stated_number", "The answer is 8. No, the answer is: 7.00", ["7"], 1.0),
        ("stated_number", "The answer is 15.", ["5"], 0.0),  # KVzip's scorer finds the 5 in it
        ("stated_number", "7", ["7"], 0.0),
        ("choice", "(B)", ["B"], 1.0),
        ("choice", "The answer is B.", ["B"], 1.0),
        ("choice", "a banana", ["A"], 0.0),  # SCBench finds the letter of a plain string in any word
        ("choice", "A banana is (C)", ["C"], 1.0),  # an article is no option
        ("choice", "I think (D)", ["D"], 1.0),
        ("choice", "", ["A"], 0.0),
        ("option", "B", ["B", "Bob", "Ann"], 1.0),
        ("option", "**B**", ["B", "Bob", "Ann"], 1.0),
        ("option", "(B) Bob", ["B", "Bob", "Ann"], 1.0),
        ("option", "The correct answer is B. Bob", ["B", "Bob", "Ann"], 1.0),
        ("option", "I would go with B", ["B", "Bob", "Ann"], 1.0),
        ("option", "It was Bob.", ["B", "Bob", "Ann"], 1.0),
        ("option", "bob", ["B", "Bob", "Ann"], 1.0),
        ("option", "Because of that, Ann", ["B", "Bob", "Ann"], 0.0),  # SCBench takes the first letter of the output
        ("option", "Bobby", ["B", "Bob", "Ann"], 0.0),
        ("option", "Ann or Bob", ["B", "Bob", "Ann"], 0.0),
        ("option", "A. Bob", ["B", "Bob", "Ann"], 0.0),  # the letter decides
        ("option", "Vitamin A", ["B", "Vitamin A", "Iron"], 1.0),
        ("option", "in New York City", ["A", "New York", "New York City"], 0.0),
        ("option", "in New York City", ["B", "New York City", "New York"], 1.0),
        ("option", "A man came", ["A"], 0.0),
        ("option", "(A)", ["A"], 1.0),
        ("option", "", ["A", "Ann", "Bob"], 0.0),
        ("found_anywhere", "it was MOBY dick", ["Moby Dick"], 1.0),
        ("found_anywhere", "Moby", ["Moby Dick"], 0.0),
        ("found_anywhere", "second", ["First", "Second"], 1.0),
        ("char_f1", "孙少安", ["孙少平"], 2 / 3),  # 2 of 3 characters on both sides
        ("char_f1", " 孙 少平。", ["孙少平"], 1.0),
        ("char_f1", "答案是孙少平", ["孙少平"], 2 / 3),  # precision 1/2, recall 1
        ("char_f1", "", ["孙少平"], 0.0),
        ("char_f1", "少平", ["孙少平", "少平"], 1.0),
        ("rouge_lsum", "the cat sat", ["the cat ran"], 2 / 3),
        ("rouge_lsum", "d e f\na b c", ["a b c\nd e f"], 1.0),  # sentence by sentence: their order is free
        ("rouge_lsum", "d e f a b c", ["a b c d e f"], 0.5),  # one sentence: 3 of 6 in order
        ("rouge_lsum", "", ["a b"], 0.0),
        ("exact_match", "The  Eiffel Tower!", ["eiffel tower"], 1.0),
        ("exact_match", "Eiffel Towers", ["eiffel tower"], 0.0),
        ("f1", "the tower of Eiffel", ["Eiffel Tower"], 0.8),  # 2 common; precision 2/3, recall 1
        ("f1", "", ["x"], 0.0),
        ("f1", "the", ["a"], 1.0),  # both are nothing once normalised
        ("included", "It was built in 1889 by him.", ["1889"], 1.0),
        ("included", "It was built in 18890.", ["1889"], 0.0),
        ("included", "anything", ["the"], 0.0),  # a gold answer that normalises to nothing is in no prediction
    ],
)
def test_metrics(metric: str, prediction: str, golds: list[str], expected: float) -> None:
    assert getattr(metrics, metric)(prediction, golds) == pytest.approx(expected)


def test_rouge_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics._rouge_scorer.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    with pytest.raises(MissingExtraError, match=r"rouge-score is not installed: pip install 'kvzip\[eval\]'"):
        metrics.rouge_lsum("a", ["a"])


def test_the_error_of_independent_scores_is_that_of_a_mean() -> None:
    scores = [0.0, 1.0, 1.0, 0.0, 1.0]
    mean, error = metrics.mean_and_error([[s] for s in scores])
    assert mean == pytest.approx(0.6)
    assert error == pytest.approx(math.sqrt(0.6 * 0.4 / 5))


def test_scores_of_one_context_count_as_dependent() -> None:
    """Two contexts, all right and all wrong: as uncertain as two scores, not as eight."""
    assert metrics.mean_and_error([[1.0] * 4, [0.0] * 4]) == pytest.approx((0.5, math.sqrt(0.25 / 2)))
    assert metrics.mean_and_error([[1.0, 0.0, 1.0, 0.0]])[1] == pytest.approx(0.25)
    assert metrics.mean_and_error([[0.7]]) == (0.7, 0.0)
    with pytest.raises(ValueError, match="no scores"):
        metrics.mean_and_error([[]])
