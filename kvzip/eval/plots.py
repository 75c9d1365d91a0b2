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
MARKERS, DASHES = "os^D", ("-", "--", ":", "-.")  # a new pair for every round through the colors
LEGEND_COLUMNS = 6
MAPS_A_ROW = 4
NOISE = 1e-6  # of a KL


def curves(lines: list[Line]) -> Any:
    """Score and KL to the full cache against keep ratio and against bytes, with errors, of one task's lines."""
    full = next((line for line in lines if line.method == FULL and line.score is not None), None)
    by_method = _by_method(lines)
    figure, ((score, score_bytes), (loss, loss_bytes)) = pyplot().subplots(
        2, 2, figsize=(12, 7.4 + 0.22 * (len(by_method) // LEGEND_COLUMNS)), layout="constrained", sharex="col"
    )
    for number, (method, found) in enumerate(by_method):
        round_, color = divmod(number, len(COLORS))
        style = {
            "fmt": f"{MARKERS[round_ % len(MARKERS)]}{DASHES[round_ % len(DASHES)]}", "color": COLORS[color],
            "markersize": 4, "linewidth": 1.2, "capsize": 2, "elinewidth": 0.8,
        }  # fmt: skip
        lossy = [line for line in found if line.kl and line.kl > NOISE]
        for axes, x, own in ((score, _ratios, found), (score_bytes, _sizes, found)):
            axes.errorbar(x(own), _percent(o.score for o in own), _percent(o.error for o in own), label=method, **style)
        for axes, x in ((loss, _ratios), (loss_bytes, _sizes)):
            axes.errorbar(x(lossy), [o.kl for o in lossy], _below([(o.kl, o.kl_error) for o in lossy]), **style)
    for axes in (score, score_bytes):
        if full is not None and full.score is not None:
            axes.axhline(100 * full.score, color="#8a9296", linestyle="--", linewidth=1)
        axes.set_ylim(-3, 103)
    for axes in (loss, loss_bytes):
        axes.set_yscale("log")
    score_bytes.set_xscale("log", base=2)
    score.set_ylabel("score")
    loss.set_ylabel("KL to the full cache, nats a token")
    loss.set_xlabel("keep ratio")
    loss_bytes.set_xlabel("KV memory, MiB")
    loss_bytes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6eaec", linewidth=0.6)
    handles, labels = score.get_legend_handles_labels()
    if labels:
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=min(len(labels), LEGEND_COLUMNS),
            frameon=False,
            fontsize=9,
        )
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
    """Share of pairs kept in each layer and head, one panel a method, at the keep ratio nearest to 0.3 or its own.

    Methods that evict nothing have no panel.
    """
    found = [row for row in rows if row["kind"] == "row" and row["method"] != FULL and row["keep_ratio"] < 1]
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
        image = axis.imshow(grid, vmin=0, vmax=1, cmap=colors, aspect="auto", interpolation="nearest")
        axis.set_title(title, fontsize=9)
        axis.set_xticks(range(len(labels[0])), labels[0], fontsize=8)
        axis.set_yticks(range(len(labels[1])), labels[1], fontsize=8)
    for axis in list(axes.flat)[len(grids) :]:
        axis.set_visible(False)
    figure.supxlabel(names[0], fontsize=9)
    figure.supylabel(names[1], fontsize=9)
    figure.colorbar(image, ax=axes, label=meaning, fraction=0.03)
    return figure


def _ratios(lines: list[Line]) -> list[float | None]:
    return [line.keep_ratio for line in lines]


def _sizes(lines: list[Line]) -> list[float]:
    return [(line.nbytes or 0) / 2**20 for line in lines]


def _below(found: list[tuple[float | None, float | None]]) -> list[list[float]]:
    """Errors below and above positive means, as a logarithmic axis can show them."""
    means = [(mean or 0.0, error or 0.0) for mean, error in found]
    return [[min(error, 0.9 * mean) for mean, error in means], [error for _, error in means]]


def _percent(values: Iterable[float | None]) -> list[float]:
    return [100 * (value or 0.0) for value in values]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
