"""Files of random contexts, what is in them, and forgeries of them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from random_context import Shape, random_context
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvzip import store
from kvzip.context import RaggedContext, RaggedLayer, SavedTail
from kvzip.errors import FormatError
from kvzip.ops.quantize import Layout

FULL_SHAPE = Shape(
    windows=(None, 5, None),
    has_bias=True,
    tail_len=6,
    num_pending=1,
    turns=(("Wer?", "Ärzte \U0001f600\n"), ("\ud83d lone", "")),
)
LEVELS_SHAPE = replace(
    FULL_SHAPE,
    head_dim=8,
    levels=((Layout(8, "token", 4), Layout(4, "channel", 5)), (Layout(2, "channel", 3), Layout(2, "token", 8))),
)
MIXED_SHAPE = replace(
    LEVELS_SHAPE,
    levels=(
        (Layout(8, "token", 4), Layout(3, "channel", 5, mixed=True)),
        (Layout(3, "channel", 3, mixed=True), Layout(3, "token", 8, rotated=True)),
    ),
)
Stored = tuple[RaggedContext, "SavedTail | None"]
Parts = tuple[dict[str, str], dict[str, Tensor]]


def named(context: RaggedContext, tail: SavedTail | None) -> dict[str, Tensor | None]:
    """Every tensor of a context and its tail under a name."""
    tensors = {n: getattr(context, n) for n in ("prefix_ids", "context_ids", "kept_bits", "ranks")}
    for i, layer in enumerate(context.layers):
        for number, level in enumerate(layer.levels):
            name = f"{i}.{number}"
            tensors |= {f"{name}.cu_seqlens": level.cu_seqlens, f"{name}.bias": level.bias}
            for kind, pairs in (("keys", level.keys), ("values", level.values)):
                stored = {"": pairs} if isinstance(pairs, Tensor) else vars(pairs)
                tensors |= {f"{name}.{kind}.{n}": t for n, t in stored.items() if isinstance(t, Tensor)}
    if tail is not None:
        tensors["ids"] = tail.token_ids
        tensors |= {f"tail.{i}.keys": t for i, t in enumerate(tail.keys)}
        tensors |= {f"tail.{i}.values": t for i, t in enumerate(tail.values)}
    return tensors


def bits(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    return tensor.dtype, tuple(tensor.shape), bytes(tensor.contiguous().flatten().view(torch.uint8).numpy())


def both(level: RaggedLayer) -> tuple[Any, Any]:
    return level.keys, level.values


def same(a: Stored, b: Stored) -> bool:
    """Equal bit for bit, info, windows and turns included."""
    tensors_a, tensors_b = named(*a), named(*b)
    if tensors_a.keys() != tensors_b.keys() or a[0].info != b[0].info:
        return False
    if [(layer.window, layer.dtype) for layer in a[0].layers] != [(x.window, x.dtype) for x in b[0].layers]:
        return False
    layouts = [
        [store.tensors._layout_of(pairs) for layer in c.layers for level in layer.levels for pairs in both(level)]
        for c, _ in (a, b)
    ]
    if layouts[0] != layouts[1]:
        return False
    words = [(t and (t.turns, t.turn_starts)) for _, t in (a, b)]
    return words[0] == words[1] and all(bits(tensors_a[n]) == bits(tensors_b[n]) for n in tensors_a)


def digest_by_the_page(metadata: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """The sha256 as docs/file-format.md describes it, written from the page alone."""
    codes = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    codes |= {torch.int32: "I32", torch.uint8: "U8", torch.int64: "I64", torch.float64: "F64"}
    text = ""
    for key in sorted(set(metadata) - {"sha256"}):
        text += f"meta {key} {hashlib.sha256(metadata[key].encode()).hexdigest()}\n"
    for name in sorted(tensors):
        dtype, shape, data = bits(tensors[name])
        sizes = "x".join(str(n) for n in shape)
        text += f"tensor {name} {codes[dtype]} {sizes} {hashlib.sha256(data).hexdigest()}\n"
    return hashlib.sha256(text.encode()).hexdigest()


def parts_of(path: Path) -> Parts:
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    return metadata, load_file(path)


def forge(path: Path, metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
    """A safetensors file of these parts with the right sha256, so that only later checks can refuse it."""
    metadata = {k: v for k, v in metadata.items() if k != "sha256"}
    metadata["sha256"] = digest_by_the_page(metadata, tensors)
    save_file({n: t.clone() for n, t in tensors.items()}, path, metadata)


def assert_refused(path: Path, words: str = "", *, verify: bool = True) -> None:
    with pytest.raises(FormatError) as caught:
        store.read(path, verify=verify)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert "kvzip compress" in message
    assert words in message


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, Stored]:
    return put_away(tmp_path, FULL_SHAPE)


@pytest.fixture
def in_levels(tmp_path: Path) -> tuple[Path, Stored]:
    """A file of format version 2."""
    return put_away(tmp_path, LEVELS_SHAPE)


@pytest.fixture(params=[FULL_SHAPE, LEVELS_SHAPE, MIXED_SHAPE], ids=["plain", "levels", "mixed"])
def either(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Stored]:
    return put_away(tmp_path, request.param)


def put_away(folder: Path, shape: Shape) -> tuple[Path, Stored]:
    path = folder / "doc.kvz"
    context, tail = random_context(shape)
    store.write(path, context, tail)
    return path, (context, tail)


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.endswith(".tmp")]


def raw(entries: dict[str, Any], data: bytes = b"", padding: int | None = None) -> bytes:
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8 if padding is None else padding)
    return len(text).to_bytes(8, "little") + text + data


def in_floats(layer: RaggedLayer) -> RaggedLayer:
    """The same layer with the numbers that its codes stand for, level by level."""
    lower = None if layer.lower is None else in_floats(layer.lower)
    return RaggedLayer(*layer.dense(), layer.cu_seqlens, layer.window, layer.bias, lower)
