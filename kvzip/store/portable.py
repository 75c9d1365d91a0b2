"""The portable file: one count of KV pairs in all heads, as one safetensors file.

    write(path, context) ──► file ──► read_info(path), read(path) ──► context

`docs/file-format.md` is the format. Written and checked as a .kvz file is; reading needs no model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kvzip.context import MOST, ContextInfo
from kvzip.errors import InputError
from kvzip.portable import Origin, PortableContext, PortableLayer, num_last
from kvzip.store.checks import MAX_HEAD_DIM
from kvzip.store.files import StrPath, digest, opened, specs_in, specs_of, store_tensors
from kvzip.store.layout import KV_DTYPES, Spec, check_loss, info_in, parse_json, windows_in
from kvzip.store.refusal import Refused, one_line, short

FORMAT, FORMAT_VERSION = "kvzip-portable", "1"
REMAKE = "make the file again with `kvzip export --portable`"
MAX_LEN = 1 << 31


@dataclass(frozen=True)
class PortableInfo:
    """What the header of a portable file says.

    num_pairs: M, slots of each head, where a question begins.  prefix_len: P of them are the prefix.  logical_len: N,
    tokens of prefix and context; the true position of a question.  windows: sliding window of each layer in tokens, or
    None.  heads: (KV heads, size of a head) of each layer.  dtype: of keys and values.  kv_nbytes: bytes of these.
    info, origin: see `PortableContext`.  sha256: digest of the contents, which names them; compared by `read` alone.
    """

    num_pairs: int
    prefix_len: int
    logical_len: int
    windows: tuple[int | None, ...]
    heads: tuple[tuple[int, int], ...]
    dtype: torch.dtype
    kv_nbytes: int
    info: ContextInfo
    origin: Origin
    sha256: str


def write(path: StrPath, context: PortableContext) -> int:
    """Store a portable context; returns the bytes written. The file appears whole or not at all.

    Raises FileError if the folder or the disk refuses, InputError if the parts of the context do not fit.
    """
    tensors = _tensors_of(context)
    try:
        specs, metadata = specs_of(tensors), _metadata_of(context)
        _check_header(metadata, specs)
        return store_tensors(path, metadata, specs, tensors)
    except (Refused, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"can't store this portable context: {one_line(error)}; compress the text again") from error


def read(path: StrPath, *, verify: bool = True) -> PortableContext:
    """Open a portable file; tensors are mapped, and loaded by the page when first touched.

    verify: compare the sha256, which reads the whole file once.
    Raises FileError (no such file, no permission), FormatError (not a portable file, damaged, or of a later format).
    """
    with opened(path, REMAKE) as mapped:
        metadata, specs = mapped.metadata() or {}, specs_in(mapped)
        header = _check_header(metadata, specs)
        tensors: dict[str, Tensor] = {name: mapped.get_tensor(name) for name in specs}
        if verify and header.sha256 != digest(metadata, specs, tensors):
            raise Refused("its sha256 does not match its contents, so it is damaged")
        layers = tuple(
            PortableLayer(tensors[f"layers.{i}.keys"], tensors[f"layers.{i}.values"], window)
            for i, window in enumerate(header.windows)
        )
        return PortableContext(layers, header.prefix_len, header.logical_len, header.info, header.origin)


def read_info(path: StrPath) -> PortableInfo:
    """What the header of a portable file says; the tensors are neither read nor verified. Raises as `read` does."""
    with opened(path, REMAKE) as mapped:
        return _check_header(mapped.metadata() or {}, specs_in(mapped))


def is_portable(path: StrPath) -> bool:
    """Whether a file says that it is a portable one. Raises FileError, or FormatError for no safetensors file."""
    with opened(path) as mapped:
        return bool((mapped.metadata() or {}).get("format") == FORMAT)


def _tensors_of(context: PortableContext) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for i, layer in enumerate(context.layers):
        tensors |= {f"layers.{i}.keys": layer.keys.detach(), f"layers.{i}.values": layer.values.detach()}
    return tensors


def _metadata_of(context: PortableContext) -> dict[str, str]:
    """All metadata but `sha256`."""
    values = {
        "num_pairs": context.num_pairs,
        "prefix_len": context.prefix_len,
        "logical_len": context.logical_len,
        "windows": [layer.window for layer in context.layers],
        "info": context.info.to_dict(),
        "origin": asdict(context.origin),
    }
    texts = {name: json.dumps(value, allow_nan=False) for name, value in values.items()}
    return {"format": FORMAT, "format_version": FORMAT_VERSION} | texts


def _check_header(metadata: Mapping[str, str], specs: Mapping[str, Spec]) -> PortableInfo:
    """Metadata, then tensors. Format and version come first: a later version may have other rules."""
    if metadata.get("format") != FORMAT:
        raise Refused("it is not a portable file of kvzip")
    version = metadata.get("format_version", "")
    if version != FORMAT_VERSION:
        is_later = version.isascii() and version.isdecimal() and int(version[:9]) > int(FORMAT_VERSION)
        reason = f"its format version is {short(version)}, this kvzip reads version {FORMAT_VERSION}"
        raise Refused(reason, "upgrade kvzip: pip install -U kvzip" if is_later else None)
    num_pairs, prefix_len, logical_len = (_count_in(metadata, n) for n in ("num_pairs", "prefix_len", "logical_len"))
    if not 0 <= prefix_len <= num_pairs <= logical_len or num_pairs == 0:
        raise Refused(f"its {prefix_len} prefix tokens, {num_pairs} pairs and {logical_len} tokens do not fit together")
    windows = tuple(windows_in(metadata))
    code, heads = _check_specs(specs, windows, num_pairs, logical_len)
    return PortableInfo(
        num_pairs=num_pairs,
        prefix_len=prefix_len,
        logical_len=logical_len,
        windows=windows,
        heads=heads,
        dtype=KV_DTYPES[code],
        kv_nbytes=sum(math.prod(shape) * KV_DTYPES[code].itemsize for _, shape in specs.values()),
        info=info_in(metadata),
        origin=_origin_in(metadata),
        sha256=metadata.get("sha256", ""),
    )


def _check_specs(
    specs: Mapping[str, Spec], windows: tuple[int | None, ...], num_pairs: int, logical_len: int
) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Exactly the tensors of the format; returns their dtype code, and number and size of each layer's KV heads."""
    code = specs.get("layers.0.keys", ("", ()))[0]
    if code not in KV_DTYPES or len(specs) != 2 * len(windows) or None not in windows:
        raise Refused(f"it lacks keys for {len(windows)} layers in one of the dtypes {', '.join(KV_DTYPES)}")
    heads = []
    for i, window in enumerate(windows):
        count = num_pairs if window is None else num_last(window, logical_len)
        if count > num_pairs:
            raise Refused(f"layer {i} sees {count} tokens, more than the {num_pairs} pairs of a head")
        shape = specs.get(f"layers.{i}.keys", ("", ()))[1]
        for name in (f"layers.{i}.keys", f"layers.{i}.values"):
            if specs.get(name) != (code, (count, *shape[1:])) or len(shape) != 3:
                raise Refused(f"tensor {name!r} is {specs.get(name, 'missing')}, expected {code} of {count} slots")
        heads.append((shape[1], shape[2]))
    full = {size for size, window in zip(heads, windows, strict=True) if window is None}
    if len(full) != 1 or not all(number > 0 and 0 < dim <= MAX_HEAD_DIM for number, dim in heads):
        raise Refused("the numbers or sizes of its KV heads do not fit together")
    return code, tuple(heads)


def _count_in(metadata: Mapping[str, str], name: str) -> int:
    text = metadata.get(name, "")
    if not (text.isascii() and text.isdecimal() and len(text) <= 10 and int(text) < MAX_LEN):
        raise Refused(f"its {name!r} is {short(text)}, expected a whole number below {MAX_LEN}")
    return int(text)


def _origin_in(metadata: Mapping[str, str]) -> Origin:
    """What the file was made from; members of later versions are left out."""
    data: dict[str, Any] = parse_json(metadata, "origin", dict, lambda key: True)
    method, keep_ratio, kv_nbytes = data.get("method"), data.get("keep_ratio"), data.get("kv_nbytes")
    loss, left_out = data.get("loss"), data.get("left_out")
    if not isinstance(method, str) or not isinstance(keep_ratio, int | float) or not isinstance(kv_nbytes, int):
        raise Refused("its 'origin' lacks a method, a keep ratio or a size")
    if not 0 <= keep_ratio <= 1 or not 0 <= kv_nbytes <= MOST**2:
        raise Refused(f"its 'origin' has a keep ratio of {keep_ratio} and {kv_nbytes} bytes, which is out of range")
    if not isinstance(loss, dict | None) or not isinstance(left_out, list) or not all(type(x) is str for x in left_out):
        raise Refused("its 'origin' has a loss or a list of what was left out of a wrong type")
    check_loss(loss or {})
    return Origin(method, float(keep_ratio), kv_nbytes, loss, tuple(left_out))
