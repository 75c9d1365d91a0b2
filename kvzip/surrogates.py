"""The weights that foretell reconstruction scores (`kvzip.distill`), kept in the cache folder as safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kvzip.errors import FileError, ModelError
from kvzip.files import write_whole
from kvzip.models.cache import cache_dir
from kvzip.scorers.base import Profile

FORMAT = 2  # counts up when `kvzip.scorers.distilled.features` changes: older weights are then refused
LARGEST_WEIGHT = 1e8  # of a fit; what is beyond could make scores infinite
MAX_HEADER_NBYTES = 1 << 16  # beside the numbers
KEY = "kvzip"  # of the metadata: one entry of JSON, as the library orders several at random
REMEDY = "make them with `kvzip distill -m MODEL`, or llm.distill(texts)"


def surrogate_path(fingerprint: str) -> Path:
    """Where the weights of a model are kept."""
    return cache_dir() / "distilled" / f"{fingerprint.replace(':', '-')}.safetensors"


def save_surrogate(fingerprint: str, profile: Profile, source: str) -> Path:
    """Store weights and the name of the texts they were fitted to, whole or not at all.

    Raises FileError, or ModelError for weights that are not finite, as a model in float16 may give.
    """
    if not all(map(_is_bounded, profile.values())):
        raise ModelError("the weights that were fitted are not finite: load the model with dtype float32")
    path = surrogate_path(fingerprint)
    about = json.dumps({"format": FORMAT, "fingerprint": fingerprint, "source": source})
    tensors = {name: value.float().cpu().contiguous() for name, value in profile.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(
            f"can't make the folder {path.parent} ({error.strerror}): set KVZIP_CACHE to a folder you can write to"
        ) from error
    write_whole(path, save(tensors, {KEY: about}))
    return path


def surrogate_source(fingerprint: str) -> str:
    """What the weights of a model, which `load_surrogate` has checked, were fitted to."""
    return str(_read(surrogate_path(fingerprint))[0].get("source", ""))


def load_surrogate(fingerprint: str, shape: tuple[int, int], num_features: int) -> Profile:
    """Weight [Lf, F, Hkv] and bias [Lf, Hkv], float32, of a model with that many full-attention layers and KV heads.

    Raises ModelError where there are none, or none that fit, naming the command that makes them.
    """
    path = surrogate_path(fingerprint)
    if not path.exists():
        raise ModelError(f"this model has no distilled weights: {REMEDY}")
    num_layers, num_kv_heads = shape
    shapes = {"weight": (num_layers, num_features, num_kv_heads), "bias": shape}
    limit = 4 * num_layers * (num_features + 1) * num_kv_heads + MAX_HEADER_NBYTES
    try:
        if path.stat().st_size > limit:
            raise ValueError(f"it is larger than {limit} bytes")
        about, profile = _read(path)
        owner = about["format"], about["fingerprint"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"the distilled weights {path} can't be read ({_reason(error)}): {REMEDY}") from error
    fits = {name: (value.shape, value.dtype) for name, value in profile.items()} == {
        name: (torch.Size(expected), torch.float32) for name, expected in shapes.items()
    }
    if owner != (FORMAT, fingerprint) or not fits or not all(map(_is_bounded, profile.values())):
        raise ModelError(f"the distilled weights {path} do not fit this model: {REMEDY}")
    return profile


def _read(path: Path) -> tuple[dict[str, object], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        about = json.loads((file.metadata() or {})[KEY])
        return about, {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


def _is_bounded(value: Tensor) -> bool:
    return bool((value.abs() <= LARGEST_WEIGHT).all())  # false for NaN


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
