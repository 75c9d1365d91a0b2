"""The report of a run as one self-contained page: curves, tables, and answers that changed. Needs matplotlib."""

from __future__ import annotations

import html
from typing import Any

from kvzip.eval.plots import curves, kept_map, needle_map, svg
from kvzip.eval.settings import FULL
from kvzip.eval.summary import Line, kept_text, kl_text, mib_text, nearest_by_bytes, percent, ratio_text, summarize

Row = dict[str, Any]
NUM_EXAMPLES = 4
MAX_SHOWN = 400  # characters of an answer
COLUMNS = (
    "method", "keep ratio", "score", "change to full", "of full", "KL", "same answer", "repeated", "KV memory",
    "contexts", "questions", "gaps",
)  # fmt: skip
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2b33; background: #fff; max-width: 66rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-top: 1px solid #d8dee1; padding-top: 1rem;
  break-after: avoid; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0; font-size: .9rem; }
th, td { padding: .15rem .55rem; white-space: nowrap; text-align: right; border-bottom: 1px solid #e6eaec; }
th { font-weight: 600; color: #5a6970; } th:first-child, td:first-child { text-align: left; padding-left: 0; }
td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 7rem; max-width: 11rem; }
.figure, .wide { overflow-x: auto; } svg { max-width: 100%; height: auto; } tr.full td { font-weight: 600; }
.facts, .gap, .caption { color: #5a6970; font-size: .9rem; overflow-wrap: anywhere; }
.example { display: grid; grid-template-columns: 9rem 1fr; gap: .2rem 1rem; margin: 1rem 0; }
.example > :nth-child(odd) { color: #5a6970; } .right { color: #2a7a4b; } .wrong { color: #b0432b; }
@media print { @page { margin: 12mm; } body { margin: 0; max-width: none; padding: 0; font-size: 12px; }
  table { font-size: 9px; } th, td { padding: .05rem .25rem; } td:first-child { min-width: 4rem; max-width: 7rem; }
  .figure, .wide { overflow: visible; } .figure svg { max-height: 11cm; }
  .figure, .example, tr { break-inside: avoid; } }
@media (max-width: 40rem) { .example { grid-template-columns: 1fr; } }
"""


def report_page(header: Row, rows: list[Row]) -> str:
    """The page of one run.  header, rows: `kvzip.eval.run.read_rows`. Raises MissingExtraError without matplotlib."""
    lines = summarize(rows)
    tasks = dict.fromkeys(row["task"] for row in rows)
    sections = [_task(task, lines, [row for row in rows if row["task"] == task]) for task in tasks]
    title = f"{header['config']['model']}: what a compressed cache costs in answers"
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{STYLE}</style></head>\n<body>\n<h1>{_text(title)}</h1>\n"
        f"{_facts(header)}\n{''.join(sections)}\n{_gaps(rows)}</body>\n</html>\n"
    )


def _facts(header: Row) -> str:
    config = header["config"]
    files = [f"{task}: {file['name']}" for task, file in config["data"].items()]
    versions = [f"{task} {version}" for task, version in config["task_versions"].items()]
    known = {
        "settings": f"{config['context_len']} tokens a context, at most {config['limit']} contexts a task, "
        f"{config['max_questions'] or 'all'} questions a context, {config['mode']}, seed {config['seed']}",
        "task versions": ", ".join(versions),
        "hash": header["hash"],
        "model": f"{config['model']} ({config['fingerprint']}), {config['dtype']}",
        "data": ", ".join(files),
        "command": header.get("command"),
        "machine": header.get("machine"),
        "kvzip": " ".join(filter(None, [config["kvzip"], header.get("commit"), header.get("date")])),
    }
    lines = [f"{name}: {_text(value)}" for name, value in known.items() if value]
    return f'<p class="facts">{"<br>".join(lines)}</p>'


def _task(task: str, lines: list[Line], rows: list[Row]) -> str:
    labels = dict.fromkeys(line.task for line in lines if line.task == task or line.task.startswith(f"{task}/"))
    parts = "".join(_part(label, [line for line in lines if line.task == label]) for label in labels)
    needles, kept = needle_map(rows), kept_map(rows)
    maps = ""
    if needles is not None:
        maps += _figure(svg(needles), "Share of needles found, by depth and keep ratio.")
    if kept is not None:
        maps += _figure(svg(kept), "Share of the context's pairs kept in each layer and KV head, mean of all contexts.")
    return f"{parts}{maps}{_examples(rows)}\n"


def _part(label: str, lines: list[Line]) -> str:
    if not any(line.score is not None for line in lines):
        return f"<h2>{_text(label)}</h2>\n{_table(lines)}\n"
    caption = (
        "Bars are standard errors with the questions of a context taken as dependent; dashed: the full cache. "
        "The pictures on the right compare at equal bytes."
    )
    best = _table(nearest_by_bytes(lines))
    return (
        f"<h2>{_text(label)}</h2>\n{_figure(svg(curves(lines)), caption)}{_table(lines)}"
        f"<h3>Nearest to the full cache for its bytes</h3>{best}\n"
    )


def _figure(picture: str, caption: str) -> str:
    return f'<div class="figure">{picture}<p class="caption">{caption}</p></div>\n'


def _table(lines: list[Line]) -> str:
    """All lines; a column that says nothing for any of them is left out."""
    rows = [_shown(line) for line in lines]
    used = [i for i in range(len(COLUMNS)) if any(row[i] not in ("", "-") for row in rows)]
    head, *picked = [tuple(row[i] for i in used) for row in (COLUMNS, *rows)]
    body = "".join(
        _cells("td", row, "full" if line.method == FULL else "") for line, row in zip(lines, picked, strict=True)
    )
    return f'<div class="wide"><table><thead>{_cells("th", head)}</thead><tbody>{body}</tbody></table></div>'


def _shown(line: Line) -> tuple[str, ...]:
    return (
        line.method,
        kept_text(line, 3),
        percent(line.score, line.error),
        "" if line.method == FULL else percent(line.change, line.change_error, "+"),
        "-" if line.relative is None else f"{100 * line.relative:.0f}%",
        kl_text(line),
        "-" if line.same is None else f"{100 * line.same:.0f}%",
        "-" if line.reconstruction is None else f"{100 * line.reconstruction:.1f}%",
        mib_text(line),
        str(line.num_contexts),
        f"{line.num_questions} of {line.num_asked}",
        str(line.gaps or ""),
    )


def _cells(tag: str, values: tuple[str, ...], cls: str = "") -> str:
    cells = "".join(f"<{tag}>{_text(value)}</{tag}>" for value in values)
    return f'<tr class="{cls}">{cells}</tr>' if cls else f"<tr>{cells}</tr>"


def _examples(rows: list[Row]) -> str:
    """A few answers that are no longer what they were, full and compressed below one another."""
    asked = {row["sample"]: row["questions"] for row in rows if row["kind"] == "asked"}
    full = {row["sample"]: row["answers"] for row in rows if row["kind"] == "row" and row["method"] == FULL}
    changed = [
        (row, question, before, after)
        for row in rows
        if row["kind"] == "row" and row["method"] != FULL
        for question, before, after in zip(asked[row["sample"]], full[row["sample"]], row["answers"], strict=True)
        if before["answer"] != after["answer"]
    ]
    if not full:
        return ""
    if not changed:
        return "<p>No answer changed.</p>"
    step = max(1, len(changed) // NUM_EXAMPLES)
    parts = [_example(*found) for found in changed[step // 2 :: step][:NUM_EXAMPLES]]
    return f"<h3>Answers that changed ({len(parts)} of {len(changed)})</h3>{''.join(parts)}"


def _example(row: Row, question: Row, before: Row, after: Row) -> str:
    cells = [
        ("question", _text(question["text"])),
        ("expected", _text(_cut(question["gold"]))),
        ("full cache", _judged(before)),
        (f"{row['method']}, {ratio_text(row['keep_ratio_asked'])}", _judged(after)),
    ]
    return '<div class="example">' + "".join(f"<span>{_text(n)}</span><span>{v}</span>" for n, v in cells) + "</div>"


def _judged(answer: Row) -> str:
    mark = "right" if answer["score"] == 1 else "wrong"
    text = _text(_cut(answer["answer"])) or "(nothing)"
    return f'<span class="{mark}">{text}</span> ({100 * answer["score"]:.0f})'


def _cut(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + " ..."


def _gaps(rows: list[Row]) -> str:
    """Reasons with what they left out, equal ones together."""
    gaps: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row["kind"] == "gap":
            gaps.setdefault((row["task"], row["method"], row["reason"]), []).append(ratio_text(row["keep_ratio_asked"]))
    if not gaps:
        return ""
    lines = [
        f"{task}, {method}, keep ratio {', '.join(dict.fromkeys(ratios))}: {reason}"
        for (task, method, reason), ratios in gaps.items()
    ]
    items = "".join(f"<li>{_text(line)}</li>" for line in lines)
    return f'<h2>Not measured</h2><ul class="gap">{items}</ul>'


def _text(value: object) -> str:
    return html.escape(str(value))
