"""The report of a run as one self-contained page: curves, tables, and answers that changed. Needs matplotlib."""

from __future__ import annotations

import html
import io
from collections.abc import Iterable
from itertools import groupby
from typing import Any

from kvzip.eval.drawing import pyplot
from kvzip.eval.summary import Line, summarize

COLORS = ("#3a8f8a", "#c1694f", "#5b6c9d", "#b08e2f", "#8a5a83", "#6b8e4e", "#4f4f4f")
NUM_EXAMPLES = 4
COLUMNS = (
    "method", "keep ratio", "score", "of full", "KL", "same answer", "KV memory", "contexts", "questions", "gaps",
)  # fmt: skip
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2b33; background: #fff; max-width: 60rem; 
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-top: 1px solid #d8dee1; padding-top: 1rem;
  break-after: avoid; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0; }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #e6eaec; }
th { font-weight: 600; color: #5a6970; } th:first-child, td:first-child { text-align: left; padding-left: 0; }
.figure { overflow-x: auto; } svg { max-width: 100%; height: auto; }
.facts, .gap, figcaption { color: #5a6970; font-size: .9rem; overflow-wrap: anywhere; }
.example { display: grid; grid-template-columns: 9rem 1fr; gap: .2rem 1rem; margin: 1rem 0; }
.example > :nth-child(odd) { color: #5a6970; } .right { color: #2a7a4b; } .wrong { color: #b0432b; }
@media print { body { margin: 0; max-width: none; } .figure, .example { break-inside: avoid; } }
@media (max-width: 40rem) { .example { grid-template-columns: 1fr; } }
"""


def report_page(header: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The page of one run.  header, rows: `kvzip.eval.run.read_rows`. Raises MissingExtraError without matplotlib."""
    lines = summarize(rows)
    config = header["config"]
    sections = [
        _task(task, list(group), [row for row in rows if row["task"] == task])
        for task, group in groupby(lines, key=lambda line: line.task)
    ]
    title = f"{config['model']}: what a compressed cache costs in answers"
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{STYLE}</style></head>\n<body>\n<h1>{_text(title)}</h1>\n"
        f"{_facts(header)}\n{''.join(sections)}\n{_gaps(rows)}</body>\n</html>\n"
    )


def _facts(header: dict[str, Any]) -> str:
    config = header["config"]
    known = {
        "settings": f"{config['context_len']} tokens a context, {config['limit']} contexts a task, "
        f"seed {config['seed']}",
        "hash": header["hash"],
        "model": f"{config['model']} ({config['fingerprint']}), {config['dtype']}",
        "data": (config["data"] or {}).get("name"),
        "command": header.get("command"),
        "machine": header.get("machine"),
        "kvzip": " ".join(filter(None, [header.get("kvzip"), header.get("commit"), header.get("date")])),
    }
    lines = [f"{name}: {_text(value)}" for name, value in known.items() if value]
    return f'<p class="facts">{"<br>".join(lines)}</p>'


def _task(task: str, lines: list[Line], rows: list[dict[str, Any]]) -> str:
    full = next((line for line in lines if line.method == "full"), None)
    curves = _curves(lines, full)
    caption = "Bars are standard errors with the questions of a context taken as dependent; dashed: the full cache."
    return (
        f"<h2>{_text(task)}</h2>\n{_table(lines)}\n"
        f'<div class="figure">{curves}<figcaption>{caption}</figcaption></div>\n{_examples(rows)}\n'
    )


def _table(lines: list[Line]) -> str:
    body = "".join(_cells("td", _shown(line)) for line in lines)
    return f"<table><thead>{_cells('th', COLUMNS)}</thead><tbody>{body}</tbody></table>"


def _shown(line: Line) -> tuple[str, ...]:
    return (
        line.method,
        f"{line.keep_ratio:.3f}",
        f"{100 * line.score:.1f} ± {100 * line.error:.1f}",
        "-" if line.relative is None else f"{100 * line.relative:.0f}%",
        f"{line.kl:.4f}",
        f"{100 * line.same:.0f}%",
        f"{line.nbytes / 2**20:.1f} MiB",
        str(line.num_contexts),
        str(line.num_questions),
        str(line.gaps),
    )


def _cells(tag: str, values: Iterable[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{_text(value)}</{tag}>" for value in values) + "</tr>"


def _curves(lines: list[Line], full: Line | None) -> str:
    """Score against keep ratio, score against bytes, KL against keep ratio, as one SVG."""
    plt = pyplot()
    figure, (by_ratio, by_bytes, loss) = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    methods = list(dict.fromkeys(line.method for line in lines if line.method != "full"))
    for color, method in zip(COLORS * len(methods), methods, strict=False):
        found = sorted((line for line in lines if line.method == method), key=lambda line: line.keep_ratio)
        scores, errors = [100 * line.score for line in found], [100 * line.error for line in found]
        ratios, sizes = [line.keep_ratio for line in found], [line.nbytes / 2**20 for line in found]
        by_ratio.errorbar(ratios, scores, errors, fmt="o-", color=color, label=method, capsize=2)
        by_bytes.errorbar(sizes, scores, errors, fmt="o-", color=color, capsize=2)
        loss.plot(ratios, [line.kl for line in found], "o-", color=color)
    for axes in (by_ratio, by_bytes):
        if full is not None:
            axes.axhline(100 * full.score, color="#8a9296", linestyle="--", linewidth=1)
        axes.set_ylim(-3, 103)
        axes.set_ylabel("score")
    loss.set_ylabel("KL to the full cache, nats a token")
    for axes, name in ((by_ratio, "keep ratio"), (by_bytes, "KV memory, MiB"), (loss, "keep ratio")):
        axes.set_xlabel(name)
        axes.spines[["top", "right"]].set_visible(False)
    if methods:
        by_ratio.legend(frameon=False, fontsize=8)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    plt.close(figure)
    picture = out.getvalue()
    return picture[picture.index("<svg") :]


def _examples(rows: list[dict[str, Any]]) -> str:
    """A few answers that are no longer what they were, full and compressed below one another."""
    full = {row["sample"]: row["questions"] for row in rows if row["kind"] == "row" and row["method"] == "full"}
    changed = [
        (row, before, after)
        for row in rows
        if row["kind"] == "row" and row["method"] != "full"
        for before, after in zip(full[row["sample"]], row["questions"], strict=True)
        if before["answer"] != after["answer"]
    ]
    if not changed:
        return "<p>No answer changed.</p>"
    step = max(1, len(changed) // NUM_EXAMPLES)
    parts = [_example(*found) for found in changed[::step][:NUM_EXAMPLES]]
    return f"<h3>Answers that changed ({len(changed)})</h3>{''.join(parts)}"


def _example(row: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> str:
    cells = [
        ("question", _text(before["question"])),
        ("expected", _text(" / ".join(before["golds"]))),
        ("full cache", _judged(before)),
        (f"{row['method']}, {row['keep_ratio_asked']:g}", _judged(after)),
    ]
    return '<div class="example">' + "".join(f"<span>{_text(n)}</span><span>{v}</span>" for n, v in cells) + "</div>"


def _judged(question: dict[str, Any]) -> str:
    mark = "right" if question["score"] == 1 else "wrong"
    return f'<span class="{mark}">{_text(question["answer"])}</span> ({100 * question["score"]:.0f})'


def _gaps(rows: list[dict[str, Any]]) -> str:
    gaps = [row for row in rows if row["kind"] == "gap"]
    if not gaps:
        return ""
    lines = [f"{row['task']}, {row['method']}, keep ratio {row['keep_ratio_asked']:g}: {row['reason']}" for row in gaps]
    items = "".join(f"<li>{_text(line)}</li>" for line in lines)
    return f'<h2>Not measured</h2><ul class="gap">{items}</ul>'


def _text(value: object) -> str:
    return html.escape(str(value))
