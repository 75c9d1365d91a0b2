"""Scores of one answer in [0, 1], and the mean of many with its error. Pure text in, numbers out.

What the published scorers do wrong is left out and named: SCBench iterates over labels that are plain strings, so that
a gold answer "A" is found in any output with an "a" in it, and each character of a Chinese answer is an answer of its
own; its multiple choice takes the first character for the option, so that "Because" means B.
"""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from kvzip.errors import MissingExtraError

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")
STATED_OPTION = re.compile(  # "(B)" anywhere, "B" or "B. text" at the beginning, "the answer is B", "option B"
    r"\(([A-Z])\)"
    r"|^[\s\"'*`]*([A-Z])(?=[.):,\"'*`]|\s*$|\s*\n)"
    r"|\b(?i:answer|option|choice)(?:\s+is)?[\s:\"'*`]*([A-Z])\b(?!['’]|\s+[a-z])"
)


def contains(prediction: str, golds: Sequence[str]) -> float:
    """1 if any gold string stands in the prediction as it is (SCBench's retrieval tasks)."""
    return float(any(gold in prediction for gold in golds))


def found_anywhere(prediction: str, golds: Sequence[str]) -> float:
    """1 if any gold string stands in the prediction in any case (SCBench's En.QA)."""
    return float(any(gold.lower() in prediction.lower() for gold in golds))


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


def option(prediction: str, golds: Sequence[str]) -> float:
    """1 if the prediction is the gold option, by its letter or by its text (En.MultiChoice, ICL.ManyShot).

    golds: the letter, the text of that option, then those of the others, so that an answer with two of them is wrong.
    A stated letter decides; "A" as an article and the first letter of a word are none.
    """
    letter, as_given = golds[0], [_bare(text) for text in golds[1:]]
    if _bare(prediction) and _bare(prediction) in as_given:
        return float(_bare(prediction) == as_given[0])
    said, texts = normalized(prediction), [normalized(text) for text in golds[1:]]
    letters = string.ascii_uppercase[: len(texts) or None]
    for found in STATED_OPTION.finditer(prediction):
        stated = found[1] or found[2] or found[3]
        if stated in letters:
            return float(stated == letter)
    named = [text for text in dict.fromkeys(texts) if text and f" {text} " in f" {said} "]
    longest = [text for text in named if not any(f" {text} " in f" {other} " for other in named if other != text)]
    if longest:
        return float(longest == texts[:1])
    return choice(prediction, [letter])


def exact_match(prediction: str, golds: Sequence[str]) -> float:
    """SQuAD's exact match: 1 if the normalised texts are equal."""
    return float(any(normalized(prediction) == normalized(gold) for gold in golds))


def f1(prediction: str, golds: Sequence[str]) -> float:
    """SQuAD's F1: the best overlap of normalised words over the gold answers."""
    return max(_f1(normalized(prediction).split(), normalized(gold).split()) for gold in golds)


def char_f1(prediction: str, golds: Sequence[str]) -> float:
    """The best F1 over characters, without white space, punctuation and symbols (SCBench's Zh.QA)."""
    return max(_f1(_letters(prediction), _letters(gold)) for gold in golds)


def rouge_lsum(prediction: str, golds: Sequence[str]) -> float:
    """The best F of ROUGE-Lsum, a sentence a line, words not stemmed. Raises MissingExtraError."""
    scorer = _rouge_scorer()
    return max(float(scorer.score(gold, prediction)["rougeLsum"].fmeasure) for gold in golds)


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


def _bare(text: str) -> str:
    return text.strip(string.whitespace + string.punctuation).lower()


def _letters(text: str) -> list[str]:
    return [c for c in text.lower() if unicodedata.category(c)[0] not in "PSZC"]


@lru_cache(maxsize=1)
def _rouge_scorer() -> Any:
    try:
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise MissingExtraError.of("rouge-score", "eval") from error
    return rouge_scorer.RougeScorer(["rougeLsum"])
