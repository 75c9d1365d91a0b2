"""Profiles of a model, made once from one text (`kvzip.profilers`) and kept in the cache folder as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kvzip.errors import ModelError
from kvzip.files import write_whole
from kvzip.models.cache import cache_dir
from kvzip.profilers import DISTILLED, PROFILERS, get_profiler
from kvzip.scorers.base import Profile


def profile_path(kind: str, fingerprint: str) -> Path:
    """Where the profile of a model is kept."""
    return cache_dir() / f"{kind}-profiles" / f"{fingerprint.replace(':', '-')}.json"


def save_profile(kind: str, fingerprint: str, profile: Profile, source: str) -> Path:
    """Store a profile and the name of the text it came from."""
    return write_profile(kind, fingerprint, {name: value.tolist() for name, value in profile.items()}, source)


def write_profile(kind: str, fingerprint: str, content: Mapping[str, Any], source: str) -> Path:
    """Store what was learned, as JSON types."""
    path = profile_path(kind, fingerprint)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"fingerprint": fingerprint, "source": source, **content}).encode())
    return path


def find_profile(kind: str, fingerprint: str) -> tuple[Path, str]:
    """The file of a profile, and what to do where it can't be used. Raises ModelError where there is none."""
    path = profile_path(kind, fingerprint)
    remedy = f"make one with `kvzip calibrate --method {kind} -m MODEL`, or llm.calibrate({kind!r}, text)"
    if not path.exists():
        raise ModelError(f"this model has no {kind} profile: {remedy}")
    return path, remedy


def load_profile(kind: str, fingerprint: str, shape: tuple[int, int]) -> Profile:
    """The profile of a model with that many full-attention layers and KV heads.

    Raises ModelError where there is none, or none that fits, naming the command that makes it.
    """
    expected = get_profiler(kind).values
    path, remedy = find_profile(kind, fingerprint)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        profile = {name: torch.tensor(content[name], dtype=torch.float32) for name in expected}
        owner = content["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"the {kind} profile {path} can't be read ({error}): {remedy}") from error
    shapes_fit = all(value.shape == shape[: expected[name]] for name, value in profile.items())
    values_fit = all(math.isfinite(x) and x >= 0 for value in profile.values() for x in value.flatten().tolist())
    if owner != fingerprint or not shapes_fit or not values_fit:
        raise ModelError(f"the {kind} profile {path} does not fit this model: {remedy}")
    return profile


def kind_needed(needs: frozenset[str]) -> str | None:
    """The kind of profile among the needs of a part, or None; no part needs two."""
    return next((kind for kind in (*PROFILERS, DISTILLED) if f"{kind}_profile" in needs), None)
