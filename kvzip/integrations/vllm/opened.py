"""A context as one worker holds it: its own layers and heads, mapped from a copy that nobody else changes."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvzip import store
from kvzip.context import RaggedContext, RaggedLayer
from kvzip.errors import FileError
from kvzip.models.cache import cache_dir

FOLDER = "served"


@dataclass(frozen=True)
class LayerShape:
    """One layer of this worker.

    num_kv_heads: that it computes.  total: of the model.  window: in tokens, or None.  hold: makes of a layer what its
    attention reads.
    """

    num_kv_heads: int
    total: int
    window: int | None
    hold: Callable[[RaggedLayer], Any]


@dataclass(frozen=True)
class Rank:
    """What part of a model a worker computes.

    layers: by the model's own numbers.  index, size: among the workers that share the heads of a layer, and how many
    these are.  device, dtype: of its keys and values.
    """

    layers: dict[int, LayerShape]
    index: int
    size: int
    device: torch.device
    dtype: torch.dtype

    def part_of(self, context: RaggedContext) -> dict[int, Any]:
        """This worker's layers and heads as it holds them; on a CPU in the file's dtype these are views.

        Raises FileError.
        """
        found = {}
        for number, shape in self.layers.items():
            layer = context.layers[number] if number < len(context.layers) else None
            if layer is None or layer.num_kv_heads != shape.total or layer.window != shape.window:
                raise FileError(f"layer {number} of the context is not as the model's: compress the text again")
            first = first_head(self, shape)
            found[number] = shape.hold(layer.heads(first, first + shape.num_kv_heads).to(self.device, self.dtype))
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # the engine reads it from a stream of its own
        return found


def first_head(rank: Rank, shape: LayerShape) -> int:
    """The first KV head of a worker: they are shared out in order, or, where there are fewer than workers, repeated."""
    if shape.total < rank.size:
        return rank.index // (rank.size // shape.total)
    return rank.index * shape.num_kv_heads


def open_context(path: str, key: str, rank: Rank) -> dict[int, Any]:
    """This worker's part of the context of that key, verified; `key` is the sha256 of its contents.

    The file is copied to the cache folder first, under its key, for all processes of the machine: what happens to the
    store from then on can't change what is mapped. Raises FileError.
    """
    copy = cache_dir() / FOLDER / f"{key}.kvz"
    if not copy.exists():
        _copy(Path(path), copy)
    try:
        found = store.read_info(copy)
        context, _ = store.read(copy)
        if found.sha256 != key:
            raise FileError(f"{path!r} was replaced while it was opened: ask again")
    except FileError:
        with suppress(OSError):
            copy.unlink()  # or the next one would meet it again
        raise
    return rank.part_of(context)


def give_up(key: str) -> None:
    """Remove the copy of a context; who has it mapped keeps it."""
    with suppress(OSError):
        (cache_dir() / FOLDER / f"{key}.kvz").unlink()


def _copy(path: Path, copy: Path) -> None:
    """Put a whole copy at `copy`, in one step. Raises FileError."""
    temporary = copy.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, temporary)
        os.replace(temporary, copy)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise FileError(
            f"can't copy {str(path)!r} to {str(copy)!r}: {error.strerror or error}; check the disk, or set KVZIP_CACHE"
        ) from error
