"""A cache folder of a test's own."""

from __future__ import annotations

from pathlib import Path

import pytest


def own_cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder; real models use the user's."""
    root = tmp_path / "cache"
    if request.node.get_closest_marker("real") is None:
        monkeypatch.setenv("KVZIP_CACHE", str(root))
    return root


def left_behind(root: Path) -> list[str]:
    """Everything in the cache but the lock files."""
    return sorted(path.name for path in root.glob("models-*/*") if path.suffix != ".lock")
