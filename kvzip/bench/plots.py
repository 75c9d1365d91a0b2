"""Pictures of result files, with matplotlib (the extra `plots`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvzip.eval.drawing import pyplot
from kvzip.eval.plots import save_pictures
from kvzip.eval.run import read_rows
from kvzip.eval.summary import summarize

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FULL, KEPT, FLOOR = "#8a9296", "#3a8f8a", "#d8c27a"


def draw(results: list[dict[str, Any]], folder: str | Path) -> dict[str, str]:
    """Write `decode.svg` and `scale.svg` to `folder`, as far as there are results; benchmark -> file name.

    Raises MissingExtraError without matplotlib.
    """
    plt, found = pyplot(), {}
    for bench, plot in (("decode", _decode), ("scale", _scale)):
        if chosen := [r for r in results if r["bench"] == bench]:
            found[bench] = f"{bench}.svg"
            _save(plt, plot, chosen, Path(folder) / found[bench])
    return found


def draw_runs(results: str | Path, folder: str | Path) -> dict[str, str]:
    """Write the pictures of every run of `kvzip eval` (*.jsonl) in `results` to `folder`; their names and files."""
    found: dict[str, str] = {}
    for path in sorted(Path(results).glob("*.jsonl")):
        _, rows = read_rows(path)
        written = save_pictures(summarize(rows), rows, folder, prefix=f"{path.stem}-", suffix=".svg")
        found |= {file.stem: file.name for file in written}
    return found


def _save(plt: Any, plot: Any, results: list[dict[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    plot(results, *axes)
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _decode(results: list[dict[str, Any]], left: Axes, right: Axes) -> None:
    """Milliseconds of attention and of whole tokens."""
    results = sorted(results, key=lambda r: (r["model"], r["context_len"], r["backend"]))
    _bars(left, results, {"full cache, sdpa": ("full_attention_s", FULL), "compressed": ("attention_s", KEPT)})
    left.set_title("Attention of one token")
    _bars(
        right,
        results,
        {
            "full cache": ("full_token_s", FULL),
            "compressed": ("token_s", KEPT),
            "empty cache (floor)": ("empty_token_s", FLOOR),
        },
    )
    right.set_title("One token, the whole model")


def _bars(axes: Axes, results: list[dict[str, Any]], series: dict[str, tuple[str, str]]) -> None:
    width = 0.8 / len(series)
    for index, (label, (name, color)) in enumerate(series.items()):
        places = [i + (index - (len(series) - 1) / 2) * width for i in range(len(results))]
        values = [1000 * r["figures"][name]["median"] for r in results]
        bars = axes.bar(places, values, width, color=color, label=label)
        axes.bar_label(bars, fmt="%.3g", fontsize=8)
    axes.set_xticks(
        range(len(results)), [f"{r['model']}\n{r['context_len']:,}, {r['backend']}" for r in results], fontsize=8
    )
    axes.set_ylabel("milliseconds")
    axes.legend(frameon=False, fontsize=8)


def _scale(results: list[dict[str, Any]], left: Axes, right: Axes) -> None:
    """Seconds and peak memory against the length."""
    rows = results[-1]["rows"]
    lengths = [row["context_len"] / 1000 for row in rows]
    left.plot(lengths, [row["prefill_s"] for row in rows], "o-", color=FULL, label="prefill")
    left.plot(lengths, [row["score_s"] for row in rows], "o-", color=KEPT, label="scoring")
    left.set_ylabel("seconds")
    right.plot(lengths, [row["peak_nbytes"] / 2**20 for row in rows], "o-", color=KEPT, label="peak")
    right.plot(lengths, [row["full_kv_nbytes"] / 2**20 for row in rows], "o-", color=FULL, label="full KV cache")
    right.set_ylabel("MiB above the loaded model")
    for axes, title in ((left, "Time"), (right, "Memory")):
        axes.set_title(title)
        axes.set_xlabel("thousand tokens")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=8)
