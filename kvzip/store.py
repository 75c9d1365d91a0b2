"""The .kvz file: a compressed context, and maybe the tail of a session, as one safetensors file.

    write(path, context, tail) ──► file ──► read(path) ──► context, tail

`docs/file-format.md` is the format itself. A file is written whole or not at all. Reading maps the tensors
into memory and runs no code; whatever the file holds, the outcome is the context that was written, or an error.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvzip.context import ContextInfo, Pairs, RaggedContext, RaggedLayer, SavedTail
from kvzip.errors import FileError, FormatError, InputError, ModelMismatchError
from kvzip.fetch.index import ClusterIndex
from kvzip.ops.quantize import AXES, BITS, Axis, Layout, QuantizedPairs
from kvzip.ops.ragged import unpack_bits

PLAIN_VERSION, FORMAT_VERSION = "1", "2"  # a file without `storage`, which older readers know too, and one with it
MAX_HEADER_NBYTES = 1 << 24
MAX_HEAD_DIM = 1 << 16
MAX_GROUP_SIZE = 1 << 16
MAX_CACHE_STEPS = 64
MAX_JSON_DEPTH = 16
KV_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = {**KV_DTYPES, "I32": torch.int32, "U8": torch.uint8}
CODES = {dtype: code for code, dtype in DTYPES.items()}
REMAKE = "make the file again with `kvzip compress`"

StrPath: TypeAlias = "str | os.PathLike[str]"
Spec: TypeAlias = tuple[str, tuple[int, ...]]  # dtype code, shape
Layouts: TypeAlias = tuple[Layout | None, Layout | None]  # of keys and values; None = numbers as they are
_safe_open: Callable[..., Any] = safe_open  # the library's own types are not complete


@dataclass(frozen=True)
class FileInfo:
    """What the header of a .kvz file says.

    windows: sliding window of each layer in tokens, None in a full-attention layer.  kv_nbytes: bytes of keys,
    values, offsets and biases of all layers.  has_tail: whether a session was stored beside the context.
    turns: its (question, answer) pairs.  turn_starts: how many tokens of the tail came before each turn.
    storage: how the pairs are stored.
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

    def named(self) -> Iterator[tuple[int, str, Layouts]]:
        """(layer, what the names of its tensors begin with, layouts) of each level, in order."""
        for layer, levels in enumerate(self.levels):
            for level, layouts in enumerate(levels):
                yield layer, f"layers.{layer}" + (f".{level}" if level else ""), layouts


class _Refused(Exception):
    """Why a file, or a context that is to become one, can't be used."""

    def __init__(self, reason: str, remedy: str = REMAKE) -> None:
        super().__init__(reason)
        self.remedy = remedy


def write(path: StrPath, context: RaggedContext, tail: SavedTail | None = None) -> int:
    """Store a context, and the tail of a session if given; returns the bytes written.

    The file appears whole, in place of an older one, or not at all: on any failure the older file stays.
    Tensors come to the host a few at a time. The same context gives the same bytes.
    Raises FileError if the folder or the disk refuses, InputError if the parts of the context do not fit.
    """
    tensors = _tensors_of(context, tail)
    try:
        specs = {name: (CODES.get(t.dtype, str(t.dtype)), tuple(t.shape)) for name, t in tensors.items()}
        metadata = _metadata_of(context, tail)
        checked = _check_header(metadata, specs)
        _check_contents(tensors, checked.windows, checked.storage)
        metadata["sha256"] = _digest(metadata, specs, tensors)
        header = _header(metadata, specs, tensors)
    except (_Refused, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"can't store this context: {_one_line(error)}; compress the text again") from error
    nbytes = len(header) + sum(tensor.nbytes for tensor in tensors.values())
    try:
        _replace(path, chain([header], map(_bytes_of, tensors.values())))
    except (OSError, ValueError) as error:
        raise _os_error(f"write {nbytes} bytes to", path, error) from error
    return nbytes


def read(path: StrPath, *, verify: bool = True) -> tuple[RaggedContext, SavedTail | None]:
    """Open a stored context, and the tail stored beside it.

    Tensors are mapped from the file and loaded by the page when first touched; the file is never written to.
    verify: compare the sha256, which reads the whole file once.
    Raises FileError (no such file, no permission), FormatError (not ours, damaged, or of a later format).
    """
    with _opened(path) as mapped:
        metadata, specs = mapped.metadata() or {}, _specs_in(mapped)
        header = _check_header(metadata, specs)
        tensors: dict[str, Tensor] = {name: mapped.get_tensor(name) for name in specs}
        if verify and metadata.get("sha256") != _digest(metadata, specs, tensors):
            raise _Refused("its sha256 does not match its contents, so it is damaged")
        _check_contents(tensors, header.windows, header.storage)
        return _context_of(tensors, header), _tail_of(tensors, header)


def mapped(context: RaggedContext, folder: Path) -> RaggedContext:
    """The same context, its tensors in a file of `folder` that has no name any more and goes with the process.

    Where the system does not remove a file that is in use, it stays in the folder. Raises FileError.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _os_error("make the folder", folder, error) from error
    path = folder / f"{uuid.uuid4().hex}.kvz"
    write(path, context)
    try:
        return read(path, verify=False)[0]
    finally:
        with suppress(OSError):
            path.unlink()


def read_info(path: StrPath) -> FileInfo:
    """What the header of a file says; the tensors are neither read nor verified. Raises as `read` does."""
    with _opened(path) as mapped:
        return _check_header(mapped.metadata() or {}, _specs_in(mapped))


def check_fingerprint(info: ContextInfo, fingerprint: str, path: StrPath) -> None:
    """Refuse a file that another model or tokenizer made. Raises ModelMismatchError."""
    if info.fingerprint != fingerprint:
        made_with = f"{_short(info.model)} ({_short(info.fingerprint)}), but the loaded model is {_short(fingerprint)}"
        remedy = f"load the model of the file, or {REMAKE}"
        raise ModelMismatchError(f"{os.fspath(path)!r} was made with {made_with}; {remedy}")


def _tensors_of(context: RaggedContext, tail: SavedTail | None) -> dict[str, Tensor]:
    """All tensors by name, in the order of the file: wide dtypes first, so that each is aligned."""
    tensors = {name: getattr(context, name) for name in ("prefix_ids", "context_ids", "kept_bits", "ranks")}
    levels = (level for layer in context.stored_layers.values() for level in layer.levels)
    for level, (_, name, _) in zip(levels, _storage_of(context).named(), strict=True):
        tensors |= _pairs_tensors(f"{name}.keys", level.keys) | _pairs_tensors(f"{name}.values", level.values)
        tensors |= {f"{name}.cu_seqlens": level.cu_seqlens, f"{name}.bias": level.bias}
        if (index := level.clusters) is not None:
            tensors |= {f"{name}.centroids": index.centroids, f"{name}.cluster_sizes": index.sizes}
            tensors[f"{name}.cu_clusters"] = index.cu_clusters
    if tail is not None:
        tensors["tail.token_ids"] = tail.token_ids
        tensors |= {f"tail.{i}.keys": t for i, t in enumerate(tail.keys) if i not in context.shared}
        tensors |= {f"tail.{i}.values": t for i, t in enumerate(tail.values) if i not in context.shared}
    present = [(name, tensor.detach()) for name, tensor in tensors.items() if tensor is not None]
    return dict(sorted(present, key=lambda item: (-item[1].dtype.itemsize, item[0])))


def _pairs_tensors(name: str, pairs: Pairs) -> dict[str, Tensor]:
    if isinstance(pairs, Tensor):
        return {name: pairs}
    return {name: pairs.codes, f"{name}.scales": pairs.scales, f"{name}.zeros": pairs.zeros}


def _storage_of(context: RaggedContext) -> Storage:
    levels = tuple(
        tuple((_layout_of(level.keys), _layout_of(level.values)) for level in layer.levels)
        if i not in context.shared
        else ()
        for i, layer in enumerate(context.layers)
    )
    indices = ((i, layer.clusters) for i, layer in enumerate(context.layers))
    clusters = {i: (index.budget, index.cache_steps) for i, index in indices if index is not None}
    return Storage(CODES.get(context.dtype, str(context.dtype)), levels, context.shared, clusters)


def _layout_dict(layout: Layout | None) -> dict[str, Any] | None:
    return None if layout is None else asdict(layout)


def _layout_of(pairs: Pairs) -> Layout | None:
    return None if isinstance(pairs, Tensor) else pairs.layout


def _metadata_of(context: RaggedContext, tail: SavedTail | None) -> dict[str, str]:
    turns, starts = (tail.turns, tail.turn_starts) if tail is not None else ((), ())
    if len(turns) != len(starts):
        raise _Refused(f"it has {len(turns)} turns, but {len(starts)} turn starts")
    values = {
        "info": context.info.to_dict(),
        "windows": [layer.window for layer in context.layers],
        "turns": [[*turn, start] for turn, start in zip(turns, starts, strict=True)],
    }
    storage = _storage_of(context)
    is_plain = not storage.clusters and all(levels == ((None, None),) for levels in storage.levels)
    if not is_plain:
        values["storage"] = storage.to_dict()
    texts = {name: json.dumps(value, allow_nan=False) for name, value in values.items()}
    return {"format": "kvzip", "format_version": PLAIN_VERSION if is_plain else FORMAT_VERSION} | texts


def _context_of(tensors: Mapping[str, Tensor], header: FileInfo) -> RaggedContext:
    storage, layers = header.storage, dict[int, RaggedLayer]()
    for i, name, (keys, values) in reversed(list(storage.named())):  # the lowest level of a layer first
        layers[i] = RaggedLayer(
            _pairs_of(tensors, f"{name}.keys", keys, storage.code),
            _pairs_of(tensors, f"{name}.values", values, storage.code),
            tensors[f"{name}.cu_seqlens"],
            header.windows[i],
            tensors.get(f"{name}.bias"),
            layers.get(i),
            _clusters_of(tensors, name, *storage.clusters[i]) if i in storage.clusters else None,
        )
    prefix_ids, context_ids, bits = (tensors[name] for name in ("prefix_ids", "context_ids", "kept_bits"))
    ordered = tuple(layers[storage.shared.get(i, i)] for i in range(len(header.windows)))
    return RaggedContext(ordered, prefix_ids, context_ids, bits, tensors.get("ranks"), header.info)


def _clusters_of(tensors: Mapping[str, Tensor], name: str, budget: int, cache_steps: int) -> ClusterIndex:
    centroids, sizes, bounds = (tensors[f"{name}.{kind}"] for kind in ("centroids", "cluster_sizes", "cu_clusters"))
    return ClusterIndex(centroids, sizes, bounds, budget, cache_steps)


def _pairs_of(tensors: Mapping[str, Tensor], name: str, layout: Layout | None, code: str) -> Pairs:
    if layout is None:
        return tensors[name]
    scales, zeros = tensors[f"{name}.scales"], tensors[f"{name}.zeros"]
    return QuantizedPairs(tensors[name], scales, zeros, layout, DTYPES[code])


def _tail_of(tensors: Mapping[str, Tensor], header: FileInfo) -> SavedTail | None:
    if not header.has_tail:
        return None
    layers = [header.storage.shared.get(i, i) for i in range(len(header.windows))]
    keys, values = (tuple(tensors[f"tail.{i}.{kind}"] for i in layers) for kind in ("keys", "values"))
    return SavedTail(keys, values, tensors["tail.token_ids"], header.turns, header.turn_starts)


def _check_header(metadata: Mapping[str, str], specs: Mapping[str, Spec]) -> FileInfo:
    """Metadata, then tensors. Format and version come first: a later version may have other rules."""
    if metadata.get("format") != "kvzip":
        raise _Refused("kvzip did not write it")
    version = metadata.get("format_version", "")
    if version not in (PLAIN_VERSION, FORMAT_VERSION):
        is_later = version.isascii() and version.isdecimal() and int(version[:9]) > int(FORMAT_VERSION)
        reason = f"its format version is {_short(version)}, this kvzip reads versions up to {FORMAT_VERSION}"
        raise _Refused(reason, "upgrade kvzip: pip install -U kvzip" if is_later else REMAKE)
    windows, turns = _parse(metadata, "windows", list, _is_window), _parse(metadata, "turns", list, _is_turn)
    plain = Storage(specs.get("layers.0.keys", ("", ()))[0], (((None, None),),) * len(windows), {}, {})
    storage = plain if version == PLAIN_VERSION else _storage_in(metadata)
    _check_specs(specs, windows, storage)
    has_tail = "tail.token_ids" in specs
    bounds = [0, *(start for _, _, start in turns), specs["tail.token_ids"][1][0] if has_tail else 0]
    if bounds != sorted(bounds):
        raise _Refused("the starts of its turns do not rise within its tail")
    nbytes = {name: math.prod(shape) * DTYPES[code].itemsize for name, (code, shape) in specs.items()}
    return FileInfo(
        info=_info_of(_parse(metadata, "info", dict, lambda key: True)),
        windows=tuple(windows),
        prefix_len=specs["prefix_ids"][1][0],
        context_len=specs["context_ids"][1][0],
        kv_nbytes=sum(n for name, n in nbytes.items() if name.startswith("layers.")),
        has_tail=has_tail,
        turns=tuple((question, answer) for question, answer, _ in turns),
        turn_starts=tuple(bounds[1:-1]),
        storage=storage,
    )


def _storage_in(metadata: Mapping[str, str]) -> Storage:
    """What the `storage` of a file says; its layers are not compared with anything yet."""
    content = _parse(metadata, "storage", dict, lambda key: True)
    code, layers = content.get("code"), content.get("levels")
    if code not in KV_DTYPES or not isinstance(layers, list) or not all(isinstance(x, list) for x in layers):
        raise _Refused("its 'storage' lacks a dtype or the levels of its layers")
    shared = _shared_in(content.get("shared", {}), len(layers))
    if any(bool(levels) == (i in shared) for i, levels in enumerate(layers)):
        raise _Refused("its 'storage' has levels of a shared layer, or a layer without levels")
    levels = tuple(tuple(_layouts_in(level) for level in levels) for levels in layers)
    return Storage(code, levels, shared, _clusters_in(content.get("clusters", {}), levels))


def _shared_in(content: Any, num_layers: int) -> dict[int, int]:
    """Which layers use the pairs of a lower one that is not shared itself; whether these fit is not looked at."""
    names = {str(i): i for i in range(num_layers)}
    if not isinstance(content, dict) or not content.keys() <= names.keys():
        raise _Refused("its 'storage' shares layers that it does not have")
    shared = {names[name]: source for name, source in content.items()}
    for layer, source in shared.items():
        if type(source) is not int or not 0 <= source < layer or source in shared:
            raise _Refused(f"its 'storage' shares layer {layer} with {_short(str(source))}, no lower layer of its own")
    return shared


def _clusters_in(content: Any, levels: tuple[tuple[Layouts, ...], ...]) -> dict[int, tuple[int, int]]:
    names = {str(i): i for i, layouts in enumerate(levels) if layouts == ((None, None),)}
    if not isinstance(content, dict) or not all(isinstance(entry, dict) for entry in content.values()):
        raise _Refused("its 'storage' has clusters that are not objects by layer")
    found = {}
    for name, entry in content.items():
        budget, steps = entry.get("budget"), entry.get("cache_steps")
        if name not in names or type(budget) is not int or type(steps) is not int:
            raise _Refused("its 'storage' has clusters of a layer that is not there or not plain, or without a budget")
        if not 0 < budget < 1 << 31 or not 0 <= steps <= MAX_CACHE_STEPS:
            raise _Refused(
                f"its 'storage' has a budget of {budget} pairs and {steps} cache steps, which is out of range"
            )
        found[names[name]] = budget, steps
    return found


def _layouts_in(level: Any) -> Layouts:
    if not isinstance(level, list) or len(level) != 2:
        raise _Refused("its 'storage' has a level that is not a pair of layouts")
    keys, values = (None if layout is None else _layout_in(layout) for layout in level)
    return keys, values


def _layout_in(content: Any) -> Layout:
    if not isinstance(content, dict):
        raise _Refused("its 'storage' has a layout that is not an object")
    bits, group_size = content.get("bits"), content.get("group_size")
    axis: Axis | None = next((known for known in AXES if known == content.get("axis")), None)
    if bits not in BITS or axis is None or type(group_size) is not int:
        raise _Refused("its 'storage' has a layout with unknown members")
    if not 0 < group_size <= MAX_GROUP_SIZE:
        raise _Refused(f"its 'storage' has a group size of {group_size}, allowed: 1 to {MAX_GROUP_SIZE}")
    return Layout(bits, axis, group_size)


def _is_window(value: Any) -> bool:
    return value is None or (type(value) is int and 0 < value < 1 << 31)


def _is_turn(value: Any) -> bool:
    return isinstance(value, list) and [type(member) for member in value] == [str, str, int]


def _info_of(data: dict[str, Any]) -> ContextInfo:
    hints = get_type_hints(ContextInfo)
    for field in fields(ContextInfo):
        allowed = {get_origin(hint) or hint for hint in get_args(hints[field.name]) or (hints[field.name],)}
        kind = type(data.get(field.name, field.default))  # without a default: a type that is never allowed
        if kind not in allowed and not (kind is int and float in allowed):
            raise _Refused(f"{field.name!r} in its 'info' is missing or of a wrong type")
    return ContextInfo.from_dict(data)


def _parse(metadata: Mapping[str, str], name: str, kind: Any, is_member: Callable[[Any], bool]) -> Any:
    """The JSON of a metadata value: a `kind` whose members (of a dict: whose keys) pass `is_member`."""
    try:
        value = json.loads(metadata.get(name, ""))
    except (ValueError, RecursionError) as error:
        raise _Refused(f"its {name!r} is missing or not valid JSON ({error})") from None
    if not isinstance(value, kind) or not all(map(is_member, value)) or not _is_plain(value, MAX_JSON_DEPTH):
        raise _Refused(f"its {name!r} has members of a wrong type or out of range, or is nested too deeply")
    return value


def _is_plain(value: Any, depth: int) -> bool:
    """Whether a JSON value is at most `depth` levels deep and holds no NaN or infinity."""
    if isinstance(value, dict | list):
        members = value.values() if isinstance(value, dict) else value
        return depth > 0 and all(_is_plain(member, depth - 1) for member in members)
    return not isinstance(value, float) or math.isfinite(value)


def _check_specs(specs: Mapping[str, Spec], windows: Sequence[int | None], storage: Storage) -> None:
    """Exactly the tensors of the format, each of the dtype and shape that the others ask for."""
    kv_code, num_stored = storage.code, len(windows) - len(storage.shared)
    if kv_code not in KV_DTYPES or len(storage.levels) != len(windows) or 3 * num_stored > len(specs):
        raise _Refused(f"it lacks keys for {len(windows)} layers in one of the dtypes {', '.join(KV_DTYPES)}")
    expected: dict[str, Spec] = {n: ("I32", _shape(specs, n, 1)) for n in ("prefix_ids", "context_ids")}
    if any(windows[i] is not None or windows[j] is not None for i, j in storage.shared.items()):
        raise _Refused("its 'storage' shares a sliding-window layer")
    heads: dict[int, tuple[int, int]] = {}  # number and size of the KV heads of each layer that is stored
    for i, name, layouts in storage.named():
        found, head = _level_specs(specs, name, kv_code, layouts)
        expected |= found | (_cluster_specs(specs, name, head) if i in storage.clusters else {})
        is_special = i in storage.clusters or layouts != (None, None) or len(storage.levels[i]) > 1
        if heads.setdefault(i, head) != head or (windows[i] is not None and is_special):
            raise _Refused(f"the levels of layer {i} do not fit together")
    full = [size for i, size in heads.items() if windows[i] is None]
    if len(set(full)) != 1 or not all(number > 0 and 0 < dim <= MAX_HEAD_DIM for number, dim in heads.values()):
        raise _Refused("the numbers or sizes of its KV heads do not fit together")
    kept_shape = (len(full), full[0][0], specs["context_ids"][1][0])
    expected |= {"kept_bits": ("U8", ((math.prod(kept_shape) + 7) // 8,)), "ranks": ("U8", kept_shape)}
    if "tail.token_ids" in specs:
        tail_len, ids = _shape(specs, "tail.0.keys", 4)[2], _shape(specs, "tail.token_ids", 1)
        expected["tail.token_ids"] = ("I32", ids if ids[0] == tail_len + 1 else (tail_len,))
        tails = {i: (kv_code, (1, number, tail_len, dim)) for i, (number, dim) in heads.items()}
        expected |= {f"tail.{i}.{kind}": spec for i, spec in tails.items() for kind in ("keys", "values")}
    for name in sorted(specs.keys() | expected.keys()):
        is_absent = name not in specs and (name == "ranks" or name.endswith(".bias"))
        if not is_absent and specs.get(name) != expected.get(name):
            got, wanted = specs.get(name, "missing"), expected.get(name, "none of that name")
            raise _Refused(f"tensor {_short(name)} is {got}, expected {wanted}")


def _cluster_specs(specs: Mapping[str, Spec], name: str, head: tuple[int, int]) -> dict[str, Spec]:
    """The tensors of the clusters of a layer as they must be.  head: number and size of its KV heads."""
    sizes = _shape(specs, f"{name}.cluster_sizes", 1)
    return {
        f"{name}.centroids": ("F32", (sizes[0], head[1])),
        f"{name}.cluster_sizes": ("I32", sizes),
        f"{name}.cu_clusters": ("I32", (head[0] + 1,)),
    }


def _level_specs(
    specs: Mapping[str, Spec], name: str, kv_code: str, layouts: Layouts
) -> tuple[dict[str, Spec], tuple[int, int]]:
    """The tensors of one level as they must be, and the number and size of its KV heads."""
    offsets, (num_pairs, width) = _shape(specs, f"{name}.cu_seqlens", 1), _shape(specs, f"{name}.keys", 2)
    bits = layouts[0].bits if layouts[0] is not None else 8
    head_dim = width * 8 // bits
    expected: dict[str, Spec] = {f"{name}.cu_seqlens": ("I32", offsets), f"{name}.bias": ("F32", (num_pairs,))}
    for kind, layout in zip(("keys", "values"), layouts, strict=True):
        pairs = f"{name}.{kind}"
        if layout is None:
            expected[pairs] = (kv_code, (num_pairs, head_dim))
            continue
        try:
            layout.check(head_dim)
        except InputError as error:
            raise _Refused(f"{pairs!r} can't be: {error}") from None
        groups = _shape(specs, f"{pairs}.scales", 2)[0] if layout.axis == "channel" else num_pairs
        scales = (groups, head_dim if layout.axis == "channel" else head_dim // layout.group_size)
        expected[pairs] = ("U8", (num_pairs, head_dim * layout.bits // 8))
        expected |= {f"{pairs}.scales": ("F16", scales), f"{pairs}.zeros": ("F16", scales)}
    return expected, (offsets[0] - 1, head_dim)


def _shape(specs: Mapping[str, Spec], name: str, num_dims: int) -> tuple[int, ...]:
    if name not in specs or len(specs[name][1]) != num_dims:
        raise _Refused(f"tensor {name!r} is {specs.get(name, 'missing')}, expected {num_dims} dimensions")
    return specs[name][1]


def _check_contents(tensors: Mapping[str, Tensor], windows: Sequence[int | None], storage: Storage) -> None:
    """Offsets, ids and keep mask fit together. `_check_header` has passed."""
    for name in ("prefix_ids", "context_ids", "tail.token_ids"):
        if name in tensors and bool((tensors[name] < 0).any()):
            raise _Refused(f"{name!r} has a negative token id")
    prefix_len, context_len = tensors["prefix_ids"].numel(), tensors["context_ids"].numel()
    full: dict[int, Tensor] = {}
    for i, name, layouts in storage.named():
        seqlens, window = _seqlens_in(tensors, name, layouts), windows[i]
        if i in storage.clusters:
            _check_clusters(tensors, name, seqlens)
        if window is None:
            full[i] = full[i] + seqlens if i in full else seqlens
        elif len(set(seqlens.tolist())) > 1 or int(seqlens[0]) > min(window, prefix_len + context_len):
            raise _Refused(f"the heads of sliding-window layer {i} do not hold the same last tokens")
    held = torch.stack(list(full.values()))
    bits, num_entries = tensors["kept_bits"].cpu(), held.numel() * context_len
    kept = unpack_bits(bits, (*held.shape, context_len)).sum(dim=-1)
    if not torch.equal(kept + prefix_len, held):
        raise _Refused("its keep mask does not match the pairs that its heads hold")
    if num_entries % 8 and int(bits[-1]) >> num_entries % 8:
        raise _Refused("its keep mask has bits set after the last entry")


def _seqlens_in(tensors: Mapping[str, Tensor], name: str, layouts: Layouts) -> Tensor:
    """Pairs of each head of one level: [H] int64."""
    offsets, num_pairs = tensors[f"{name}.cu_seqlens"].cpu().long(), len(tensors[f"{name}.keys"])
    seqlens = offsets.diff()
    if int(offsets[0]) != 0 or int(offsets[-1]) != num_pairs or bool((seqlens < 0).any()):
        raise _Refused(f"the offsets of {name!r} must rise from 0 to its {num_pairs} pairs")
    for kind, layout in zip(("keys", "values"), layouts, strict=True):
        if layout is not None and layout.axis == "channel":
            found, groups = len(tensors[f"{name}.{kind}.scales"]), layout.num_groups(tuple(offsets.tolist()))
            if found != groups:
                raise _Refused(f"'{name}.{kind}.scales' has {found} groups, its heads have {groups}")
    return seqlens


def _check_clusters(tensors: Mapping[str, Tensor], name: str, seqlens: Tensor) -> None:
    """Clusters have pairs, and no more than their heads have."""
    sizes, bounds = (tensors[f"{name}.{kind}"].cpu().long() for kind in ("cluster_sizes", "cu_clusters"))
    if int(bounds[0]) != 0 or int(bounds[-1]) != len(sizes) or bool((bounds.diff() < 0).any()):
        raise _Refused(f"the clusters of {name!r} must rise from 0 to {len(sizes)} over its heads")
    before = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))[bounds]
    if bool((sizes < 1).any()) or bool((before.diff() > seqlens).any()):
        raise _Refused(f"the clusters of {name!r} are empty, or hold more pairs than their heads")


def _bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; a copy only where it is strided or on a device."""
    return memoryview(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]


def _digest(metadata: Mapping[str, str], specs: Mapping[str, Spec], tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes of all tensors, and all metadata but `sha256` itself."""
    names = sorted(specs)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # hashlib releases the GIL
        sums = list(pool.map(lambda name: hashlib.sha256(_bytes_of(tensors[name])).hexdigest(), names))
    texts = sorted(item for item in metadata.items() if item[0] != "sha256")
    lines = [f"meta {key} {hashlib.sha256(text.encode()).hexdigest()}\n" for key, text in texts]
    for name, digest in zip(names, sums, strict=True):
        lines.append(f"tensor {name} {specs[name][0]} {'x'.join(map(str, specs[name][1]))} {digest}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _header(metadata: dict[str, str], specs: Mapping[str, Spec], tensors: Mapping[str, Tensor]) -> bytes:
    """What stands before the data in a safetensors file.

    Not by the library's `save_file`: it orders metadata at random and wants all tensors on the host at once.
    """
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        entries[name] = {"dtype": specs[name][0], "shape": specs[name][1], "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_NBYTES:
        raise _Refused(f"its header takes {len(text)} bytes, allowed: {MAX_HEADER_NBYTES}")
    return len(text).to_bytes(8, "little") + text


def _replace(path: StrPath, pieces: Iterable[bytes | memoryview]) -> None:
    """Put a file with these pieces at `path`, in one step, or leave what is there."""
    target = os.path.realpath(path)
    if os.path.exists(target) and not os.path.isfile(target):  # a folder; or a device, which must stay one
        raise OSError(errno.EINVAL, "Not a regular file")
    folder = os.path.dirname(target)
    temporary = os.path.join(folder, f".kvzip-{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    with suppress(OSError):  # some systems can't open a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _opened(path: StrPath) -> Iterator[Any]:
    """The mapped file. What goes wrong inside leaves as FileError or FormatError, a line that names the file.

    safe_open opens its path twice. By its descriptor, where the system has names for these, both are the same
    file even while another process puts a new one in its place.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would block
            raise OSError(errno.EINVAL, "Not a regular file")
        with open(path, "rb") as file:
            size, header_len = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
            if not 2 <= header_len <= min(size - 8, MAX_HEADER_NBYTES):
                raise _Refused("it is cut short, or not a safetensors file")
            name = f"/dev/fd/{file.fileno()}"
            with _safe_open(name if os.path.exists(name) else os.fspath(path), framework="pt") as mapped:
                yield mapped
    except OSError as error:
        raise _os_error("read", path, error) from error
    except (_Refused, SafetensorError, RuntimeError, TypeError, ValueError, OverflowError) as error:
        remedy = getattr(error, "remedy", REMAKE)
        raise FormatError(f"can't use {os.fspath(path)!r}: {_one_line(error)}; {remedy}") from error


def _specs_in(mapped: Any) -> dict[str, Spec]:
    slices = ((name, mapped.get_slice(name)) for name in mapped.keys())  # noqa: SIM118
    return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices}


def _os_error(action: str, path: StrPath, error: OSError | ValueError) -> FileError:
    is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "free some space or use another disk" if is_full else "check the path, its folder and permissions"
    reason = getattr(error, "strerror", None) or _one_line(error)
    return FileError(f"can't {action} {os.fspath(path)!r}: {reason}; {remedy}")


def _short(text: str) -> str:
    return repr(text if len(text) <= 48 else f"{text[:28]}...{text[-16:]}")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:297]}..."
