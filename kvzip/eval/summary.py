"""From the rows of `kvzip eval` to means with errors: what tables and pictures show."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from kvzip.eval.metrics import mean_and_error


@dataclass(frozen=True)
class Line:
    """One method at one keep ratio on one task.

    score, error: mean and its standard error, contexts as clusters.  relative: score over the full cache's on the same
    samples, None where that is 0.  kl: mean KL(full || compressed) a token, in nats.  same: share of unchanged answers.
    num_contexts, num_questions: measured.  gaps: samples without a result.  nbytes, full_nbytes: mean of the contexts.
    """

    task: str
    method: str
    keep_ratio_asked: float
    keep_ratio: float
    score: float
    error: float
    relative: float | None
    kl: float
    same: float
    num_contexts: int
    num_questions: int
    gaps: int
    nbytes: float
    full_nbytes: float


def summarize(rows: list[dict[str, Any]]) -> list[Line]:
    """One line for each task, method and keep ratio that has a result, in the order of the rows."""
    groups: dict[tuple[str, str, float], list[dict[str, Any]]] = defaultdict(list)
    gaps: dict[tuple[str, str, float], int] = defaultdict(int)
    for row in rows:
        key = row["task"], row["method"], row["keep_ratio_asked"]
        if row["kind"] == "row":
            groups[key].append(row)
        else:
            gaps[key] += 1
    full = {(row["task"], row["sample"]): row for row in rows if row["kind"] == "row" and row["method"] == "full"}
    return [_line(key, found, gaps[key], full) for key, found in groups.items()]


def _line(
    key: tuple[str, str, float], rows: list[dict[str, Any]], gaps: int, full: dict[tuple[str, int], dict[str, Any]]
) -> Line:
    clusters = [[q["score"] for q in row["questions"]] for row in rows]
    score, error = mean_and_error(clusters)
    base, _ = mean_and_error([[q["score"] for q in full[row["task"], row["sample"]]["questions"]] for row in rows])
    questions = [q for row in rows for q in row["questions"]]
    return Line(
        task=key[0],
        method=key[1],
        keep_ratio_asked=key[2],
        keep_ratio=_mean([row["keep_ratio"] for row in rows]),
        score=score,
        error=error,
        relative=score / base if base else None,
        kl=_mean([q["kl"] for q in questions]),
        same=_mean([q["same_answer"] for q in questions]),
        num_contexts=len(rows),
        num_questions=len(questions),
        gaps=gaps,
        nbytes=_mean([row["kv_nbytes"] for row in rows]),
        full_nbytes=_mean([row["full_kv_nbytes"] for row in rows]),
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
