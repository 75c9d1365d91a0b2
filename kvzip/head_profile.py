"""One score a KV head, computed once per model and kept in the cache folder (KVzip's context-independent eviction)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from kvzip.errors import ModelError
from kvzip.files import write_whole
from kvzip.models.cache import cache_dir


def profile_path(fingerprint: str) -> Path:
    """Where the profile of a model is kept."""
    return cache_dir() / "head-profiles" / f"{fingerprint.replace(':', '-')}.json"


def save_head_profile(fingerprint: str, head_scores: Tensor, source: str) -> Path:
    """Store head scores [Lf, Hkv] float32 and the name of the text they came from."""
    path = profile_path(fingerprint)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"fingerprint": fingerprint, "source": source, "head_scores": head_scores.tolist()}
    write_whole(path, json.dumps(content).encode())
    return path


def load_head_profile(fingerprint: str, shape: tuple[int, int]) -> Tensor:
    """Head scores [Lf, Hkv] float32. Raises ModelError where there are none, naming the command that makes them."""
    path = profile_path(fingerprint)
    remedy = "make one with `kvzip profile-heads -m MODEL`, or llm.profile_heads()"
    if not path.exists():
        raise ModelError(f"this model has no head profile: {remedy}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        scores = torch.tensor(content["head_scores"], dtype=torch.float32)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"the head profile {path} can't be read ({error}): {remedy}") from error
    if scores.shape != shape or not all(map(math.isfinite, scores.flatten().tolist())):
        raise ModelError(f"the head profile {path} does not fit this model: {remedy}")
    return scores
