"""From the rows of `kvzip eval` to means with errors: what tables and pictures show."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from kvzip.eval.metrics import mean_and_error
from kvzip.eval.settings import FULL

Row = dict[str, Any]
Key = tuple[str, str, float | None]  # task (and part), method, keep ratio asked
NUM_BITS = {"float32": 32, "bfloat16": 16, "float16": 16}


@dataclass(frozen=True)
class Line:
    """One method at one keep ratio on one task, or on one part of a mixed task ("mix-repoqa-kv/kv").

    keep_ratio_asked: None where the method decides how much to keep.  score, error: mean and its standard error,
    contexts as clusters.  change, change_error: score minus that of the full cache on the same questions.  relative:
    score over the full cache's, None where that is 0.  kl, kl_error: mean KL(full || compressed) a token in nats, and
    its standard error.  same: share of unchanged answers.  reconstruction: share of the text that is still repeated, or
    None.  num_contexts, num_questions: measured.  num_asked: questions with those of gaps.  gaps: samples without a
    result.  nbytes: mean of what the contexts take in memory, of fetched ones at a step.  full_nbytes: the same of the
    full caches.  seconds: answering and comparing, a question.  All numbers of a line without a result are None.
    """

    task: str
    method: str
    keep_ratio_asked: float | None
    keep_ratio: float | None = None
    score: float | None = None
    error: float | None = None
    change: float | None = None
    change_error: float | None = None
    relative: float | None = None
    kl: float | None = None
    kl_error: float | None = None
    same: float | None = None
    reconstruction: float | None = None
    num_contexts: int = 0
    num_questions: int = 0
    num_asked: int = 0
    gaps: int = 0
    nbytes: float | None = None
    full_nbytes: float | None = None
    seconds: float | None = None


@dataclass
class _Group:
    """Rows of one line, each with those of its answers that count, and the full cache's beside them."""

    rows: list[tuple[Row, list[Row], list[Row]]] = field(default_factory=list)
    gaps: int = 0
    unanswered: int = 0


def summarize(rows: list[Row]) -> list[Line]:
    """One line for each task, part, method and keep ratio, in the order of the rows; those with gaps alone as well."""
    asked = {(row["task"], row["sample"]): row["questions"] for row in rows if row["kind"] == "asked"}
    full = {(r["task"], r["sample"]): r["answers"] for r in rows if r["kind"] == "row" and r["method"] == FULL}
    groups: dict[Key, _Group] = defaultdict(_Group)
    for row in rows:
        sample = row["task"], row["sample"]
        if row["kind"] == "row":
            for part, places in _parts(asked[sample]):
                group = groups[_label(row["task"], part), row["method"], row["keep_ratio_asked"]]
                answers, before = ([found[i] for i in places] for found in (row["answers"], full[sample]))
                group.rows.append((row, answers, before))
        elif row["kind"] == "gap":
            group = groups[row["task"], row["method"], row["keep_ratio_asked"]]
            group.gaps += 1
            group.unanswered += row["num_questions"]
    return [_line(key, group) for key, group in groups.items()]


def _parts(questions: list[Row]) -> Iterator[tuple[str, list[int]]]:
    """Each part of a sample's questions with their places."""
    for part in dict.fromkeys(question["part"] for question in questions):
        yield part, [i for i, question in enumerate(questions) if question["part"] == part]


def _label(task: str, part: str) -> str:
    return f"{task}/{part}" if part else task


def _line(key: Key, group: _Group) -> Line:
    task, method, asked = key
    if not group.rows:
        return Line(task, method, asked, num_asked=group.unanswered, gaps=group.gaps)
    scores = [[a["score"] for a in answers] for _, answers, _ in group.rows]
    before = [[b["score"] for b in full] for _, _, full in group.rows]
    changes = [[a - b for a, b in zip(*both, strict=True)] for both in zip(scores, before, strict=True)]
    answers = [answer for _, found, _ in group.rows for answer in found]
    losses = [[a["kl"] for a in answers] for _, answers, _ in group.rows]
    (score, error), (change, change_error), (base, _), (kl, kl_error) = (
        mean_and_error(clusters) for clusters in (scores, changes, before, losses)
    )
    rows = [row for row, _, _ in group.rows]
    repeated = [row["reconstruction"] for row in rows if row["reconstruction"] is not None]
    return Line(
        task=task,
        method=method,
        keep_ratio_asked=asked,
        keep_ratio=_mean([row["keep_ratio"] for row in rows]),
        score=score,
        error=error,
        change=change,
        change_error=change_error,
        relative=score / base if base else None,
        kl=kl,
        kl_error=kl_error,
        same=_mean([a["same_answer"] for a in answers]),
        reconstruction=_mean(repeated) if repeated else None,
        num_contexts=len(rows),
        num_questions=len(answers),
        num_asked=len(answers) + group.unanswered,
        gaps=group.gaps,
        nbytes=_mean([row.get("resident_kv_nbytes") or row["kv_nbytes"] for row in rows]),
        full_nbytes=_mean([row["full_kv_nbytes"] for row in rows]),
        seconds=sum(row["ask_s"] for row in rows) / sum(len(row["answers"]) for row in rows),
    )


def nearest_by_bytes(lines: list[Line]) -> list[Line]:
    """The lines of one task that no other beats: none with as few bytes has a KL as low. The fewest bytes first."""
    measured = [line for line in lines if line.kl is not None and line.method != FULL]
    best: list[Line] = []
    for line in sorted(measured, key=lambda line: (line.nbytes or 0.0, line.kl or 0.0)):
        if not best or (line.kl or 0.0) < (best[-1].kl or 0.0):
            best.append(line)
    return best


def ratio_text(keep_ratio: float | None) -> str:
    """A keep ratio as it was asked for, "0.3"; "own" where the method decides."""
    return "own" if keep_ratio is None else f"{keep_ratio:g}"


def kept_text(line: Line, digits: int) -> str:
    """The keep ratio as reached; as asked where there is no result."""
    known = line.keep_ratio_asked if line.keep_ratio is None else line.keep_ratio
    return ratio_text(None) if known is None else f"{known:.{digits}f}"


def percent(value: float | None, error: float | None, sign: str = "") -> str:
    """A mean and its error in percent, "83.3 ± 4.2"; "-" where there is none.  sign: "+" shows that of a difference."""
    return "-" if value is None or error is None else f"{100 * value:{sign}.1f} ± {100 * error:.1f}"


def mib_text(line: Line) -> str:
    """What its contexts take in memory, and that as a share of the full cache."""
    if line.nbytes is None or not line.full_nbytes:
        return "-"
    return f"{line.nbytes / 2**20:.1f} MiB ({100 * line.nbytes / line.full_nbytes:.0f}%)"


def less_text(line: Line, dtype: str) -> str:
    """How many times less its contexts take than full caches of 16-bit numbers would, "12.1x".  dtype: of the run."""
    if not line.nbytes or not line.full_nbytes or dtype not in NUM_BITS:
        return "-"
    return f"{line.full_nbytes * 16 / NUM_BITS[dtype] / line.nbytes:.1f}x"


def kl_text(line: Line) -> str:
    """KL and its standard error, "0.0123 ± 0.0045"."""
    return "-" if line.kl is None or line.kl_error is None else f"{line.kl:.4f} ± {line.kl_error:.4f}"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
