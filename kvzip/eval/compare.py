"""Two runs of `kvzip eval` against each other, question by question."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from kvzip.errors import InputError
from kvzip.eval.metrics import mean_and_error

Row = dict[str, Any]
Cell = tuple[str, str, float | None]  # task, method, keep ratio asked


@dataclass(frozen=True)
class Difference:
    """One task, method and keep ratio in two runs, over the questions that both asked of the same contexts.

    keep_ratio: as asked; None where the method decides.  first, second: mean scores.  change, error: second minus
    first, and its standard error, contexts as clusters.
    """

    task: str
    method: str
    keep_ratio: float | None
    first: float
    second: float
    change: float
    error: float
    num_questions: int


def compare(first: list[Row], second: list[Row]) -> list[Difference]:
    """What both runs measured, in the order of the first. Raises InputError where they have nothing in common."""
    before, after = _scores(first), _scores(second)
    shared = {cell: _shared(scores, after.get(cell, {})) for cell, scores in before.items()}
    found = [_difference(cell, pairs) for cell, pairs in shared.items() if pairs]
    if not found:
        raise InputError(
            "the two runs share no question of a task, method and keep ratio: compare runs of the same tasks, "
            "context length and seed"
        )
    return found


Scores = dict[int, dict[str, float]]  # by sample and question


def _scores(rows: list[Row]) -> dict[Cell, Scores]:
    texts = {(r["task"], r["sample"]): [q["text"] for q in r["questions"]] for r in rows if r["kind"] == "asked"}
    cells: dict[Cell, Scores] = defaultdict(dict)
    for row in rows:
        if row["kind"] == "row":
            asked = texts[row["task"], row["sample"]]
            scores = {text: answer["score"] for text, answer in zip(asked, row["answers"], strict=True)}
            cells[row["task"], row["method"], row["keep_ratio_asked"]][row["sample"]] = scores
    return dict(cells)


def _shared(first: Scores, second: Scores) -> list[list[tuple[float, float]]]:
    """Pairs of scores of each context that both have."""
    both = [(scores, second.get(sample, {})) for sample, scores in first.items()]
    pairs = ([(a, other[text]) for text, a in scores.items() if text in other] for scores, other in both)
    return [found for found in pairs if found]


def _difference(cell: Cell, shared: list[list[tuple[float, float]]]) -> Difference:
    change, error = mean_and_error([[b - a for a, b in pairs] for pairs in shared])
    flat = [pair for pairs in shared for pair in pairs]
    means = [sum(pair[i] for pair in flat) / len(flat) for i in (0, 1)]
    return Difference(*cell, means[0], means[1], change, error, len(flat))
