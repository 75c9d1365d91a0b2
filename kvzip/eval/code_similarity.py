"""Whether an answer reproduces a function: the score of RepoQA (arXiv 2406.06025)."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from textwrap import dedent
from typing import Any

from kvzip.errors import MissingExtraError

THRESHOLD = 0.8
FENCED = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)


def same_function(prediction: str, golds: Sequence[str]) -> float:
    """1 if the function in the prediction is more like the asked one than like any other, and alike enough.

    golds: the asked function, then all the others of the code.  Likeness is smoothed BLEU (method 4 of NLTK) over
    words between white space; the threshold is 0.8.  Raises MissingExtraError without NLTK.
    """
    found = first_function(prediction)
    asked = bleu(found, golds[0])
    return float(asked >= THRESHOLD and all(asked >= bleu(found, other) for other in golds[1:]))


def first_function(text: str) -> str:
    """The first Python function of the first fenced block, or of the text; all of it where none can be told."""
    fenced = FENCED.search(text)
    code = dedent(fenced[1] if fenced else text).strip("\n")
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, MemoryError, RecursionError):  # the last two: ten thousand dashes, say
        return code.strip()
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    if not functions:
        return code.strip()
    found = min(functions, key=lambda node: node.lineno)
    return dedent("\n".join(code.split("\n")[found.lineno - 1 : found.end_lineno]))


def bleu(found: str, expected: str) -> float:
    """Smoothed BLEU of one text against another, in [0, 1]; 0 for an empty one."""
    translate = _nltk()
    words, reference = found.split(), expected.split()
    if not words or not reference:
        return 0.0
    smooth = translate.SmoothingFunction().method4
    return float(translate.sentence_bleu([reference], words, smoothing_function=smooth))


def _nltk() -> Any:
    try:
        from nltk.translate import bleu_score
    except ImportError as error:
        raise MissingExtraError.of("nltk", "eval") from error
    return bleu_score
