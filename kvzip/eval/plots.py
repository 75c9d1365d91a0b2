"""The pictures of a run, as matplotlib figures: curves, the heat map of needles, what was kept where."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kvzip.eval.drawing import pyplot
from kvzip.eval.settings import FULL
from kvzip.eval.summary import Line, ratio_text

Row = dict[str, Any]
COLORS = (
    "#3a8f8a", "#c1694f", "#5b6c9d", "#b08e2f", "#8a5a83", "#6b8e4e", "#4f4f4f", "#a34a6a", "#4d8fb8", "#7a6a55",
)  # fmt: skip
MAPS_A_ROW = 4


def curves(lines: list[Line]) -> Any:
    """Score against keep ratio and against bytes, with errors, and KL to the full cache, of one task's lines."""
    full = next((line for line in lines if line.method == FULL and line.score is not None), None)
    figure, (by_ratio, by_bytes, loss) = pyplot().subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for number, (method, found) in enumerate(_by_method(lines)):
        color = COLORS[number % len(COLORS)]
        errors, scores = _percent(line.error for line in found), _percent(line.score for line in found)
        ratios, sizes = [line.keep_ratio for line in found], [(line.nbytes or 0) / 2**20 for line in found]
        style = {"fmt": "o-", "color": color, "markersize": 4, "linewidth": 1.4, "capsize": 2, "elinewidth": 0.8}
        by_ratio.errorbar(ratios, scores, errors, label=method, **style)
        by_bytes.errorbar(sizes, scores, errors, **style)
        lossy = [(r, line.kl) for r, line in zip(ratios, found, strict=True) if line.kl and line.kl > 1e-6]
        loss.plot([r for r, _ in lossy], [kl for _, kl in lossy], "o-", color=color, markersize=4, linewidth=1.4)
    for axes in (by_ratio, by_bytes):
        if full is not None and full.score is not None:
            axes.axhline(100 * full.score, color="#8a9296", linestyle="--", linewidth=1)
        axes.set_ylim(-3, 103)
        axes.set_ylabel("score")
    loss.set_ylabel("KL to the full cache, nats a token")
    if loss.lines:
        loss.set_yscale("log")
    for axes, name in ((by_ratio, "keep ratio"), (by_bytes, "KV memory, MiB"), (loss, "keep ratio")):
        axes.set_xlabel(name)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = by_ratio.get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 7), frameon=False, fontsize=9)
    return figure


def needle_map(rows: list[Row]) -> Any | None:
    """Depth of the needle against keep ratio, one panel a method (and length); None for rows without depths."""
    depth_of = {r["sample"]: r["about"] for r in rows if r["kind"] == "asked" and "depth" in r["about"]}
    found = [row for row in rows if row["kind"] == "row" and row["method"] != FULL and row["sample"] in depth_of]
    if not found:
        return None
    depths = sorted({about["depth"] for about in depth_of.values()})
    lengths = sorted({about["context_len"] for about in depth_of.values()})
    ratios = sorted({row["keep_ratio_asked"] for row in found}, key=lambda r: -1.0 if r is None else r, reverse=True)
    grids: dict[str, list[list[float]]] = {}
    for method in dict.fromkeys(row["method"] for row in found):
        for length in lengths:
            cells: dict[tuple[float, float | None], list[float]] = {}
            for row in found:
                about = depth_of[row["sample"]]
                if row["method"] == method and about["context_len"] == length:
                    score = sum(answer["score"] for answer in row["answers"]) / len(row["answers"])
                    cells.setdefault((about["depth"], row["keep_ratio_asked"]), []).append(score)
            title = method if len(lengths) == 1 else f"{method}, {length:,} tokens"
            grids[title] = [[_mean(cells.get((depth, ratio), [])) for ratio in ratios] for depth in depths]
    labels = [ratio_text(ratio) for ratio in ratios], [f"{100 * depth:.0f}%" for depth in depths]
    return _maps(grids, labels, ("keep ratio", "depth of the needle"), "RdYlGn", "share found")


def kept_map(rows: list[Row]) -> Any | None:
    """Share of pairs kept in each layer and head, one panel a method, at the keep ratio nearest to 0.3 or its own."""
    found = [row for row in rows if row["kind"] == "row" and row["method"] != FULL and row["keep_ratio_asked"] != 1]
    if not found:
        return None
    ratios = [row["keep_ratio_asked"] for row in found if row["keep_ratio_asked"] is not None]
    ratio = min(ratios, key=lambda r: abs(r - 0.3), default=None)
    grids = {}
    for method in dict.fromkeys(row["method"] for row in found):
        own = [row for row in found if row["method"] == method]
        shares = [row["kept_share"] for row in own if row["keep_ratio_asked"] in (ratio, None)]
        if shares:
            grids[method] = [
                [_mean([share[layer][head] for share in shares]) for layer in range(len(shares[0]))]
                for head in range(len(shares[0][0]))
            ]
    heads = len(next(iter(grids.values())))
    layers = len(next(iter(grids.values()))[0])
    labels = [str(i) if i % 5 == 0 else "" for i in range(layers)], [str(i) for i in range(heads)]
    return _maps(grids, labels, ("layer", "KV head"), "viridis", f"share kept at keep ratio {ratio_text(ratio)}")


def svg(figure: Any) -> str:
    """The figure as an element of a page; closes it."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    pyplot().close(figure)
    picture = out.getvalue()
    return picture[picture.index("<svg") :]


def save_pictures(
    lines: list[Line], rows: list[Row], folder: str | Path, *, prefix: str = "", suffix: str = ".png"
) -> list[Path]:
    """Every picture of a run in `folder`, which is made; returns the files.  suffix: ".png" or ".svg"."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    unstable = {".png": "Software", ".svg": "Date"}[suffix]  # left out: the same run gives the same bytes
    written = []
    for name, figure in pictures(lines, rows):
        written.append(Path(folder) / f"{prefix}{name}{suffix}")
        figure.savefig(written[-1], dpi=130 if suffix == ".png" else "figure", metadata={unstable: None})
        pyplot().close(figure)
    return written


def pictures(lines: list[Line], rows: list[Row]) -> Iterator[tuple[str, Any]]:
    """Names and figures: curves of each task or part, and of each task the needle and kept maps that it has."""
    for label in dict.fromkeys(line.task for line in lines):
        yield f"{label.replace('/', '-')}-curves", curves([line for line in lines if line.task == label])
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        for kind, figure in (("needles", needle_map(own)), ("kept", kept_map(own))):
            if figure is not None:
                yield f"{task}-{kind}", figure


def _by_method(lines: list[Line]) -> list[tuple[str, list[Line]]]:
    """Lines with a result of each method but the full cache, by keep ratio as reached."""
    measured = [line for line in lines if line.score is not None and line.method != FULL]
    methods = dict.fromkeys(line.method for line in measured)
    return [
        (method, sorted((line for line in measured if line.method == method), key=lambda line: line.keep_ratio or 0.0))
        for method in methods
    ]


def _maps(
    grids: dict[str, list[list[float]]],
    labels: tuple[list[str], list[str]],
    names: tuple[str, str],
    colors: str,
    meaning: str,
) -> Any:
    """Heat maps beside one another with one scale from 0 to 1.  grids: rows of columns; nan = not measured."""
    across = min(MAPS_A_ROW, len(grids))
    down = -(-len(grids) // across)
    height = max(1.5, min(3.0, 0.28 * len(labels[1]) + 0.9))
    figure, axes = pyplot().subplots(
        down, across, figsize=(12, height * down), layout="constrained", squeeze=False, sharex=True, sharey=True
    )
    image = None
    for axis, (title, grid) in zip(axes.flat, grids.items(), strict=False):
        image = axis.pcolormesh(grid, vmin=0, vmax=1, cmap=colors)
        axis.set_title(title, fontsize=9)
        axis.set_xticks([i + 0.5 for i in range(len(labels[0]))], labels[0], fontsize=8)
        axis.set_yticks([i + 0.5 for i in range(len(labels[1]))], labels[1], fontsize=8)
        axis.set_ylim(len(grid), 0)
    for axis in list(axes.flat)[len(grids) :]:
        axis.set_visible(False)
    figure.supxlabel(names[0], fontsize=9)
    figure.supylabel(names[1], fontsize=9)
    figure.colorbar(image, ax=axes, label=meaning, fraction=0.03)
    return figure


def _percent(values: Iterable[float | None]) -> list[float]:
    return [100 * (value or 0.0) for value in values]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
