"""A context as one worker holds it: its own layers and heads, mapped from a copy that nobody else changes."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from kvzip import store
from kvzip.context import RaggedContext, RaggedLayer
from kvzip.errors import FileError
from kvzip.integrations.vllm.library import PORTABLE, SUFFIXES
from kvzip.models.cache import cache_dir
from kvzip.portable import PortableContext
from kvzip.store import portable

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
    these are.  device, dtype: of its keys and values.  why_no_handles: why only portable contexts are served, or "".
    """

    layers: dict[int, LayerShape]
    index: int
    size: int
    device: torch.device
    dtype: torch.dtype
    why_no_handles: str = ""

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


# What a worker keeps: its layers as their attention holds them, or all of a portable context.
Held: TypeAlias = "dict[int, Any] | PortableContext"


def open_context(path: str, key: str, rank: Rank) -> Held:
    """This worker's part of the context of that key, or a portable one whole, verified; `key` is the sha256 of it.

    The file is copied to the cache folder first, under its key, for all processes of the machine: what happens to the
    store from then on can't change what is mapped. Raises FileError.
    """
    copy = cache_dir() / FOLDER / f"{key}{Path(path).suffix}"
    if copy.exists():
        with suppress(FileError):  # of a process that gave it up meanwhile, or whose store was changed
            return _verified(copy, key, rank)
    _copy(Path(path), copy)
    return _verified(copy, key, rank)


def _verified(copy: Path, key: str, rank: Rank) -> Held:
    """What is held of a copy; one that is not of that key is removed. Raises FileError."""
    try:
        info, found = _read(copy, rank)
        if info.sha256 != key:
            raise FileError("the file was replaced while it was opened: ask again")
    except FileError:
        give_up(key)
        raise
    return found


def _read(copy: Path, rank: Rank) -> tuple[store.FileInfo | portable.PortableInfo, Held]:
    if copy.suffix == PORTABLE:
        info = portable.read_info(copy)
        for number, shape in rank.layers.items():
            fits = number < len(info.heads) and info.heads[number][0] == shape.total
            if not fits or info.windows[number] != shape.window:
                raise FileError(f"layer {number} of the context is not as the model's: compress the text again")
        return info, portable.read(copy)
    if rank.why_no_handles:
        raise FileError(rank.why_no_handles)
    return store.read_info(copy), rank.part_of(store.read(copy)[0])


def give_up(key: str) -> None:
    """Remove the copy of a context; who has it mapped keeps it."""
    for suffix in SUFFIXES:
        with suppress(OSError):
            (cache_dir() / FOLDER / f"{key}{suffix}").unlink()


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
