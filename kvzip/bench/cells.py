"""What the tables of `docs/results.md` are made of: cells out of figures, and a table with its heading."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Result = dict[str, Any]


def section(title: str, text: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"## {title}\n\n{text}\n\n{table}\n"


def subject(result: Result) -> list[str]:
    return [result["model"], f"{result['context_len']:,}"]


def median(result: Result, name: str) -> float:
    return float(result["figures"][name]["median"])


def least(result: Result, name: str) -> str:
    return f"{result['figures'][name]['min']:.4f}"


def mean(result: Result, name: str) -> str:
    """Mean and standard error."""
    values = result["figures"][name]["values"]
    mean = sum(values) / len(values)
    error = (sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1) / len(values)) ** 0.5
    return f"{mean:.4f} ± {error:.4f}"


def share(result: Result, name: str) -> str:
    """Of how many it is true."""
    values = result["figures"][name]["values"]
    return f"{sum(values):.0f} of {len(values)}"


def seconds(result: Result, name: str) -> str:
    return figure(result, name, lambda v: f"{v:.3g}", " s")


def milliseconds(result: Result, name: str) -> str:
    return figure(result, name, lambda v: f"{1000 * v:.3g}", " ms")


def times(result: Result, name: str) -> str:
    return figure(result, name, lambda v: f"{v:.2f}", "x")


def figure(result: Result, name: str, show: Callable[[float], str], unit: str) -> str:
    """Median and extremes, or that it was not measured."""
    found = result["figures"].get(name)
    if found is None:
        return "not measured"
    if found["n"] == 1:
        return f"{show(found['median'])}{unit}"
    return f"{show(found['median'])} [{show(found['min'])} - {show(found['max'])}]{unit}"


def mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:.1f} MiB"
