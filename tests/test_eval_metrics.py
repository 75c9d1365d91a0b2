"""Every metric against cases worked out by hand, those that published scorers get wrong among them."""

from __future__ import annotations

import math

import pytest

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
