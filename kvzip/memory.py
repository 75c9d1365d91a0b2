"""Resident memory of this process, where the system tells it."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from contextlib import suppress
from pathlib import Path

STATUS = Path("/proc/self/status")


def rss_nbytes() -> int:
    """Resident memory now, in bytes; 0 where the system does not tell."""
    return _status("VmRSS")


def peak_rss_nbytes() -> int:
    """Highest resident memory since the last `reset_peak_rss`, or since the process began; 0 where unknown."""
    if peak := _status("VmHWM"):
        return peak
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_rss() -> None:
    """Start `peak_rss_nbytes` anew, where the system allows it (Linux)."""
    with suppress(OSError):  # the peak then is the whole process's, which is what it says
        Path(f"/proc/{os.getpid()}/clear_refs").write_text("5")


def release_freed() -> None:
    """Give memory that was freed back to the system, where the C library can be asked to (glibc)."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _status(key: str) -> int:
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return 0
    found = [line.split() for line in lines if line.startswith(key + ":")]
    return int(found[0][1]) * 1024 if found else 0
