"""A run of `kvzip eval` as a section of a Markdown page."""

from __future__ import annotations

from typing import Any

from kvzip.eval.settings import FULL
from kvzip.eval.summary import (
    Line,
    kept_text,
    kl_text,
    less_text,
    mib_text,
    nearest_by_bytes,
    percent,
    ratio_text,
    summarize,
)

Row = dict[str, Any]
OURS = "kvzip"
HARDLY = 0.1  # a full cache that scores less says little of methods


def section(header: Row, rows: list[Row], pictures: dict[str, str]) -> str:
    """Tables of scores and of KL for each task or part, with its pictures, and where the figures come from.

    header, rows: `kvzip.eval.run.read_rows`.  pictures: file by name, the names of `kvzip.eval.plots.pictures`.
    """
    lines = summarize(rows)
    labels = dict.fromkeys(line.task for line in lines)
    config = header["config"]
    num_methods = len({line.method for line in lines} - {FULL})
    parts = [f"## Answers: {config['model']}, {', '.join(config['tasks'])}, {num_methods} methods\n"]
    for label in labels:
        parts.append(_task(label, [line for line in lines if line.task == label], config["dtype"], pictures))
    return "\n".join([*parts, _losses(lines), _origin(header)])


def _task(label: str, lines: list[Line], dtype: str, pictures: dict[str, str]) -> str:
    full = next((line for line in lines if line.method == FULL), None)
    if full is None or full.score is None:
        return f"### {label}\n\nNot measured: see the gaps in the result file.\n"
    text = (
        f"Full cache: {_score(full)}, {full.num_questions} questions about {full.num_contexts} contexts, "
        f"{(full.full_nbytes or 0) / 2**20:.1f} MiB each. Columns are keep ratios.\n"
    )
    if full.score < HARDLY:
        text += "\nThe model hardly solves this task even with its full cache: the KL says more than the score.\n"
    methods = [line for line in lines if line.method != FULL]
    score = _table("score (%)", methods, _score)
    loss = _table("KL to the full cache (nats a token)", methods, kl_text)
    stem = label.replace("/", "-")
    task = label.partition("/")[0]
    names = [f"{stem}-curves", *([f"{task}-needles", f"{task}-kept"] if stem == task else [])]
    shown = [f"![{name}]({pictures[name]})\n" for name in names if name in pictures]
    return "\n".join([f"### {label}\n", text, score, loss, _by_bytes(methods, dtype), *shown])


def _by_bytes(methods: list[Line], dtype: str) -> str:
    """What to take at equal bytes."""
    text = (
        "At equal bytes: the lines that no other beats, each nearer to the full cache by KL than all that take as few "
        "bytes or fewer. Codes, scales, offsets and prefix count; shares are of the full cache in the run's dtype, the "
        "column after them compares with one of 16-bit numbers.\n"
    )
    head = (
        "| method | keep ratio | KV memory (of full) | less than 16-bit | KL | score (%) |\n"
        "| --- | --- | --- | --- | --- | --- |"
    )
    body = [
        f"| {line.method} | {kept_text(line, 3)} | {mib_text(line)} | {less_text(line, dtype)} | {kl_text(line)} "
        f"| {_score(line)} |"
        for line in nearest_by_bytes(methods)
    ]
    return "\n".join([text, head, *body, ""])


def _table(title: str, lines: list[Line], show: Any) -> str:
    ratios = sorted({line.keep_ratio_asked for line in lines}, key=lambda r: -1.0 if r is None else r, reverse=True)
    found = {(line.method, line.keep_ratio_asked): line for line in lines}
    head = f"| {title} | {' | '.join(map(ratio_text, ratios))} |\n|{' --- |' * (len(ratios) + 1)}"

    def cell(line: Line | None) -> str:
        if line is None:
            return "-"
        return f"{show(line)} at {kept_text(line, 2)}" if line.keep_ratio_asked is None else str(show(line))

    body = [
        f"| {method} | {' | '.join(cell(found.get((method, r))) for r in ratios)} |"
        for method in dict.fromkeys(line.method for line in lines)
    ]
    return "\n".join([head, *body, ""])


def _losses(lines: list[Line]) -> str:
    """Where another method does better than ours at the same keep ratio, by score or by KL."""
    found = []
    for own in (line for line in lines if line.method == OURS and line.score is not None):
        same = [
            line for line in lines
            if (line.task, line.keep_ratio_asked) == (own.task, own.keep_ratio_asked)
            and line.method not in (FULL, OURS) and line.score is not None
        ]  # fmt: skip
        better = [f"{line.method} ({_score(line)})" for line in same if (line.score or 0) > (own.score or 0)]
        nearer = [f"{line.method} ({_number(line.kl)})" for line in same if (line.kl or 0) < (own.kl or 0)]
        where = f"{own.task} at {ratio_text(own.keep_ratio_asked)}"
        if better:
            found.append(f"- {where}: score {_score(own)} against {', '.join(better)}")
        if nearer:
            found.append(f"- {where}: KL {_number(own.kl)} against {', '.join(nearer)}")
    listed = "\n".join(found) or "- nowhere in this run"
    return f"### Where `{OURS}` is not the best\n\nErrors overlap in many of these; all are listed.\n\n{listed}\n"


def _origin(header: Row) -> str:
    config = header["config"]
    packages = ", ".join(f"{name} {version}" for name, version in header.get("packages", {}).items())
    data = ", ".join(f"{task} from {file['name']}" for task, file in config["data"].items())
    return (
        f"How this was measured: `{header.get('command')}`, {header.get('date')}, kvzip {config['kvzip']} at "
        f"{header.get('commit') or 'no checkout'}, {packages}, {config['dtype']}, {header.get('machine')}; contexts of "
        f"about {config['context_len']:,} tokens, at most {config['limit']} a task and "
        f"{config['max_questions'] or 'all'} questions each, {config['mode']}, seed {config['seed']}"
        f"{'; ' + data if data else ''}; settings {header['hash']}.\n"
    )


def _score(line: Line) -> str:
    return percent(line.score, line.error)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
