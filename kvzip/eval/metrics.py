"""Scores of one answer in [0, 1], and the mean of many with its error. Pure text in, numbers out.

What the published scorers do wrong is left out and named: SCBench iterates over labels that are plain strings, so that
a gold answer "A" is found in any output with an "a" in it.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")


def contains(prediction: str, golds: Sequence[str]) -> float:
    """1 if any gold string stands in the prediction as it is (SCBench's retrieval tasks)."""
    return float(any(gold in prediction for gold in golds))


def fraction_found(prediction: str, golds: Sequence[str]) -> float:
    """The share of the gold words that stand in the prediction, as whole words in any case (variable tracking)."""
    words = set(re.findall(r"\w+", prediction.lower()))
    return sum(gold.lower() in words for gold in golds) / len(golds)


def first_number(prediction: str, golds: Sequence[str]) -> float:
    """1 if the first number of the prediction equals a gold number (Math.Find, passkeys)."""
    found = NUMBER.search(prediction)
    return float(found is not None and any(_number(found[0]) == _number(gold) for gold in golds))


def stated_number(prediction: str, golds: Sequence[str]) -> float:
    """1 if the number after the last "answer is" of the prediction equals a gold number (GSM8K)."""
    stated = prediction.lower().rpartition("answer is")
    return first_number(stated[2], golds) if stated[1] else 0.0


def choice(prediction: str, golds: Sequence[str]) -> float:
    """1 if the option that the prediction names first is gold.  golds: option letters, as "B".

    An option is a capital letter alone or in parentheses: "(B)", "B", "B.", "The answer is B".
    """
    found = re.search(r"\(([A-Z])\)|\b([A-Z])\b(?!['’])", re.sub(r"\b(A|I)\s+(?=[a-z])", "", prediction))
    return float(found is not None and (found[1] or found[2]) in golds)


def exact_match(prediction: str, golds: Sequence[str]) -> float:
    """SQuAD's exact match: 1 if the normalised texts are equal."""
    return float(any(normalized(prediction) == normalized(gold) for gold in golds))


def f1(prediction: str, golds: Sequence[str]) -> float:
    """SQuAD's F1: the best overlap of normalised words over the gold answers."""
    return max(_f1(normalized(prediction).split(), normalized(gold).split()) for gold in golds)


def included(prediction: str, golds: Sequence[str]) -> float:
    """1 if a normalised gold answer stands in the normalised prediction, at word borders (KVzip's SQuAD accuracy)."""
    padded = f" {normalized(prediction)} "
    return float(any(f" {normalized(gold)} " in padded for gold in golds if normalized(gold)))


def normalized(text: str) -> str:
    """SQuAD's normal form: lower case, no punctuation, no articles, single spaces."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def mean_and_error(clusters: Iterable[Sequence[float]]) -> tuple[float, float]:
    """Mean over all scores, and its standard error with scores of one context taken as dependent.

    clusters: the scores of each context.  The error of a single context is that of independent scores; of a single
    score it is 0.  Source: the cluster-robust variance of a mean (arXiv 2411.00640, section 2.2).
    """
    groups = [list(group) for group in clusters if group]
    scores = [score for group in groups for score in group]
    if not scores:
        raise ValueError("there are no scores to take the mean of")
    mean = sum(scores) / len(scores)
    if len(groups) == 1:
        groups = [[score] for score in scores]
    spread = sum(sum(score - mean for score in group) ** 2 for group in groups)
    return mean, math.sqrt(spread) / len(scores)


def _number(text: str) -> float:
    return float(text.replace(",", "").strip())


def _f1(found: list[str], gold: list[str]) -> float:
    if not found or not gold:
        return float(found == gold)
    common = sum((Counter(found) & Counter(gold)).values())
    return 2 * common / (len(found) + len(gold))
