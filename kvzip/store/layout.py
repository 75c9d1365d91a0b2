"""What a file says: how its pairs are stored and the rest of its metadata, parsed from JSON of any origin."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeAlias, get_args, get_origin, get_type_hints

import torch

from kvzip.context import LOSS_RANGES, ContextInfo
from kvzip.ops.quantize import AXES, BITS, Axis, Layout
from kvzip.store.refusal import Refused, short

VERSIONS = ("1", "2", "3")  # without `storage`; with it; with strings of bits or rotations: each file has the least
PLAIN_VERSION, FORMAT_VERSION = VERSIONS[0], VERSIONS[-1]
MAX_GROUP_SIZE = 1 << 16
MAX_CACHE_STEPS = 64
MAX_JSON_DEPTH = 16
KV_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = {**KV_DTYPES, "I32": torch.int32, "U8": torch.uint8}
CODES = {dtype: code for code, dtype in DTYPES.items()}


Spec: TypeAlias = tuple[str, tuple[int, ...]]  # dtype code, shape
Layouts: TypeAlias = tuple[Layout | None, Layout | None]  # of keys and values; None = numbers as they are


@dataclass(frozen=True)
class FileInfo:
    """What the header of a .kvz file says.

    windows: sliding window of each layer in tokens, None in a full-attention layer.  kv_nbytes: bytes of keys,
    values, offsets and biases of all layers.  has_tail: whether a session was stored beside the context.
    turns: its (question, answer) pairs.  turn_starts: how many tokens of the tail came before each turn.
    storage: how the pairs are stored.  version: of the format.  sha256: what the file says of its contents, "" before
    it is written.
    """

    info: ContextInfo
    windows: tuple[int | None, ...]
    prefix_len: int
    context_len: int
    kv_nbytes: int
    has_tail: bool
    turns: tuple[tuple[str, str], ...]
    turn_starts: tuple[int, ...]
    storage: Storage
    version: str
    sha256: str = ""


@dataclass(frozen=True)
class Storage:
    """How the pairs of a file are stored.

    code: dtype code of what they are read as, and of the tail.  levels: for each layer the layouts of its levels; none
    for a shared layer.  shared: layers without tensors, each with the lower layer whose pairs it uses.
    clusters: of the layers whose pairs are fetched, by layer: (budget, cache steps).
    """

    code: str
    levels: tuple[tuple[Layouts, ...], ...]
    shared: dict[int, int]
    clusters: Mapping[int, tuple[int, int]]

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the file; without `shared` and `clusters` where there are none."""
        levels = [[[_layout_dict(layout) for layout in level] for level in levels] for levels in self.levels]
        content: dict[str, Any] = {"code": self.code, "levels": levels}
        shared = {str(i): source for i, source in self.shared.items()}
        named = {str(i): {"budget": budget, "cache_steps": steps} for i, (budget, steps) in self.clusters.items()}
        return content | {name: value for name, value in (("shared", shared), ("clusters", named)) if value}

    @property
    def is_latest(self) -> bool:
        """Whether some codes are strings of bits, or rotated."""
        layouts = (layout for _, _, pair in self.named() for layout in pair)
        return any(layout is not None and (layout.is_stream or layout.rotated) for layout in layouts)

    def named(self) -> Iterator[tuple[int, str, Layouts]]:
        """(layer, what the names of its tensors begin with, layouts) of each level, in order."""
        for layer, levels in enumerate(self.levels):
            for level, layouts in enumerate(levels):
                yield layer, f"layers.{layer}" + (f".{level}" if level else ""), layouts


def _layout_dict(layout: Layout | None) -> dict[str, Any] | None:
    """As version 2 has it, where nothing is mixed."""
    return None if layout is None else {name: value for name, value in asdict(layout).items() if value is not False}


def storage_in(metadata: Mapping[str, str]) -> Storage:
    """What the `storage` of a file says; its layers are not compared with anything yet."""
    content = parse_json(metadata, "storage", dict, lambda key: True)
    code, layers = content.get("code"), content.get("levels")
    if code not in KV_DTYPES or not isinstance(layers, list) or not all(isinstance(x, list) for x in layers):
        raise Refused("its 'storage' lacks a dtype or the levels of its layers")
    shared = _shared_in(content.get("shared", {}), len(layers))
    if any(bool(levels) == (i in shared) for i, levels in enumerate(layers)):
        raise Refused("its 'storage' has levels of a shared layer, or a layer without levels")
    levels = tuple(tuple(_layouts_in(level) for level in levels) for levels in layers)
    return Storage(code, levels, shared, _clusters_in(content.get("clusters", {}), levels))


def _shared_in(content: Any, num_layers: int) -> dict[int, int]:
    """Which layers use the pairs of a lower one that is not shared itself; whether these fit is not looked at."""
    names = {str(i): i for i in range(num_layers)}
    if not isinstance(content, dict) or not content.keys() <= names.keys():
        raise Refused("its 'storage' shares layers that it does not have")
    shared = {names[name]: source for name, source in content.items()}
    for layer, source in shared.items():
        if type(source) is not int or not 0 <= source < layer or source in shared:
            raise Refused(f"its 'storage' shares layer {layer} with {short(str(source))}, no lower layer of its own")
    return shared


def _clusters_in(content: Any, levels: tuple[tuple[Layouts, ...], ...]) -> dict[int, tuple[int, int]]:
    names = {str(i): i for i, layouts in enumerate(levels) if layouts == ((None, None),)}
    if not isinstance(content, dict) or not all(isinstance(entry, dict) for entry in content.values()):
        raise Refused("its 'storage' has clusters that are not objects by layer")
    found = {}
    for name, entry in content.items():
        budget, steps = entry.get("budget"), entry.get("cache_steps")
        if name not in names or type(budget) is not int or type(steps) is not int:
            raise Refused("its 'storage' has clusters of a layer that is not there or not plain, or without a budget")
        if not 0 < budget < 1 << 31 or not 0 <= steps <= MAX_CACHE_STEPS:
            raise Refused(
                f"its 'storage' has a budget of {budget} pairs and {steps} cache steps, which is out of range"
            )
        found[names[name]] = budget, steps
    return found


def _layouts_in(level: Any) -> Layouts:
    if not isinstance(level, list) or len(level) != 2:
        raise Refused("its 'storage' has a level that is not a pair of layouts")
    keys, values = (None if layout is None else _layout_in(layout) for layout in level)
    return keys, values


def _layout_in(content: Any) -> Layout:
    if not isinstance(content, dict):
        raise Refused("its 'storage' has a layout that is not an object")
    bits, group_size = content.get("bits"), content.get("group_size")
    flags = [content.get(name, False) for name in ("mixed", "rotated")]
    axis: Axis | None = next((known for known in AXES if known == content.get("axis")), None)
    if type(bits) is not int or type(group_size) is not int or any(type(flag) is not bool for flag in flags):
        raise Refused("its 'storage' has a layout with members of a wrong type")
    if bits not in BITS or axis is None:
        raise Refused("its 'storage' has a layout with unknown members")
    if not 0 < group_size <= MAX_GROUP_SIZE:
        raise Refused(f"its 'storage' has a group size of {group_size}, allowed: 1 to {MAX_GROUP_SIZE}")
    return Layout(bits, axis, group_size, *flags)


def windows_in(metadata: Mapping[str, str]) -> list[int | None]:
    """The sliding window of each layer."""
    found: list[int | None] = parse_json(metadata, "windows", list, _is_window)
    return found


def turns_in(metadata: Mapping[str, str]) -> list[tuple[str, str, int]]:
    """(question, answer, how many tokens of the tail came before) of each turn."""
    return [(question, answer, start) for question, answer, start in parse_json(metadata, "turns", list, _is_turn)]


def _is_window(value: Any) -> bool:
    return value is None or (type(value) is int and 0 < value < 1 << 31)


def _is_turn(value: Any) -> bool:
    return isinstance(value, list) and [type(member) for member in value] == [str, str, int]


def info_in(metadata: Mapping[str, str]) -> ContextInfo:
    """What is known of the context; members of later versions are left out."""
    data = parse_json(metadata, "info", dict, lambda key: True)
    hints = get_type_hints(ContextInfo)
    for field in fields(ContextInfo):
        allowed = {get_origin(hint) or hint for hint in get_args(hints[field.name]) or (hints[field.name],)}
        kind = type(data.get(field.name, field.default))  # without a default: a type that is never allowed
        if kind not in allowed and not (kind is int and float in allowed):
            raise Refused(f"{field.name!r} in its 'info' is missing or of a wrong type")
    check_loss(data.get("loss") or {})
    return ContextInfo.from_dict(data)


def check_loss(loss: dict[str, Any]) -> None:
    """Numbers within their ranges; members of later versions may be anything, as nothing reads them."""
    for name, (least, most) in LOSS_RANGES.items():
        value = loss.get(name, least)
        if type(value) not in (int, float) or not least <= value <= most:
            raise Refused(f"{name!r} in the 'loss' of its 'info' is {short(str(value))}, allowed: {least} to {most:g}")


def parse_json(metadata: Mapping[str, str], name: str, kind: Any, is_member: Callable[[Any], bool]) -> Any:
    """The JSON of a metadata value: a `kind` whose members (of a dict: whose keys) pass `is_member`."""
    try:
        value = json.loads(metadata.get(name, ""))
    except (ValueError, RecursionError) as error:
        raise Refused(f"its {name!r} is missing or not valid JSON ({error})") from None
    if not isinstance(value, kind) or not all(map(is_member, value)) or not _is_plain(value, MAX_JSON_DEPTH):
        raise Refused(f"its {name!r} has members of a wrong type or out of range, or is nested too deeply")
    return value


def _is_plain(value: Any, depth: int) -> bool:
    """Whether a JSON value is at most `depth` levels deep and holds no NaN or infinity."""
    if isinstance(value, dict | list):
        members = value.values() if isinstance(value, dict) else value
        return depth > 0 and all(_is_plain(member, depth - 1) for member in members)
    return not isinstance(value, float) or math.isfinite(value)
