"""What must fit together: the metadata of a file, its tensors, and what these hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kvzip.errors import InputError
from kvzip.ops.quantize import MAX_BITS
from kvzip.ops.ragged import unpack_bits
from kvzip.store.layout import (
    DTYPES,
    FORMAT_VERSION,
    KV_DTYPES,
    PLAIN_VERSION,
    VERSIONS,
    FileInfo,
    Layouts,
    Spec,
    Storage,
    info_in,
    storage_in,
    turns_in,
    windows_in,
)
from kvzip.store.refusal import REMAKE, Refused, short

MAX_HEAD_DIM = 1 << 16


def check_header(metadata: Mapping[str, str], specs: Mapping[str, Spec]) -> FileInfo:
    """Metadata, then tensors. Format and version come first: a later version may have other rules."""
    if metadata.get("format") != "kvzip":
        is_portable = metadata.get("format") == "kvzip-portable"
        raise Refused(
            "it has the portable layout, for other engines" if is_portable else "kvzip did not write it",
            f"give the .kvz that it was made of, or {REMAKE}" if is_portable else None,
        )
    version = metadata.get("format_version", "")
    if version not in VERSIONS:
        is_later = version.isascii() and version.isdecimal() and int(version[:9]) > int(FORMAT_VERSION)
        reason = f"its format version is {short(version)}, this kvzip reads versions up to {FORMAT_VERSION}"
        raise Refused(reason, "upgrade kvzip: pip install -U kvzip" if is_later else REMAKE)
    windows, turns = windows_in(metadata), turns_in(metadata)
    plain = Storage(specs.get("layers.0.keys", ("", ()))[0], (((None, None),),) * len(windows), {}, {})
    storage = plain if version == PLAIN_VERSION else storage_in(metadata)
    if version == PLAIN_VERSION and any(_is_bias(name) and spec[0] == "F16" for name, spec in specs.items()):
        raise Refused("it has biases in F16, which format version 1 does not know")
    if version != FORMAT_VERSION and storage.is_latest:
        raise Refused(f"its 'storage' has layouts that format version {version} does not know")
    _check_specs(specs, windows, storage)
    has_tail = "tail.token_ids" in specs
    bounds = [0, *(start for _, _, start in turns), specs["tail.token_ids"][1][0] if has_tail else 0]
    if bounds != sorted(bounds):
        raise Refused("the starts of its turns do not rise within its tail")
    nbytes = {name: math.prod(shape) * DTYPES[code].itemsize for name, (code, shape) in specs.items()}
    return FileInfo(
        info=info_in(metadata),
        windows=tuple(windows),
        prefix_len=specs["prefix_ids"][1][0],
        context_len=specs["context_ids"][1][0],
        kv_nbytes=sum(n for name, n in nbytes.items() if name.startswith("layers.")),
        has_tail=has_tail,
        turns=tuple((question, answer) for question, answer, _ in turns),
        turn_starts=tuple(bounds[1:-1]),
        storage=storage,
        version=version,
        sha256=metadata.get("sha256", ""),
    )


def _check_specs(specs: Mapping[str, Spec], windows: Sequence[int | None], storage: Storage) -> None:
    """Exactly the tensors of the format, each of the dtype and shape that the others ask for."""
    kv_code, num_stored = storage.code, len(windows) - len(storage.shared)
    if kv_code not in KV_DTYPES or len(storage.levels) != len(windows) or 3 * num_stored > len(specs):
        raise Refused(f"it lacks keys for {len(windows)} layers in one of the dtypes {', '.join(KV_DTYPES)}")
    expected: dict[str, Spec] = {n: ("I32", _shape(specs, n, 1)) for n in ("prefix_ids", "context_ids")}
    if any(windows[i] is not None or windows[j] is not None for i, j in storage.shared.items()):
        raise Refused("its 'storage' shares a sliding-window layer")
    heads: dict[int, tuple[int, int]] = {}  # number and size of the KV heads of each layer that is stored
    for i, name, layouts in storage.named():
        found, head = _level_specs(specs, name, kv_code, layouts)
        expected |= found | (_cluster_specs(specs, name, head) if i in storage.clusters else {})
        is_special = i in storage.clusters or layouts != (None, None) or len(storage.levels[i]) > 1
        if heads.setdefault(i, head) != head or (windows[i] is not None and is_special):
            raise Refused(f"the levels of layer {i} do not fit together")
    full = [size for i, size in heads.items() if windows[i] is None]
    if len(set(full)) != 1 or not all(number > 0 and 0 < dim <= MAX_HEAD_DIM for number, dim in heads.values()):
        raise Refused("the numbers or sizes of its KV heads do not fit together")
    kept_shape = (len(full), full[0][0], specs["context_ids"][1][0])
    expected |= {"kept_bits": ("U8", ((math.prod(kept_shape) + 7) // 8,)), "ranks": ("U8", kept_shape)}
    if "tail.token_ids" in specs:
        tail_len, ids = _shape(specs, "tail.0.keys", 4)[2], _shape(specs, "tail.token_ids", 1)
        expected["tail.token_ids"] = ("I32", ids if ids[0] == tail_len + 1 else (tail_len,))
        tails = {i: (kv_code, (1, number, tail_len, dim)) for i, (number, dim) in heads.items()}
        expected |= {f"tail.{i}.{kind}": spec for i, spec in tails.items() for kind in ("keys", "values")}
    for name in sorted(specs.keys() | expected.keys()):
        is_absent = name not in specs and (name == "ranks" or _is_bias(name))
        if not is_absent and specs.get(name) != expected.get(name):
            got, wanted = specs.get(name, "missing"), expected.get(name, "none of that name")
            raise Refused(f"tensor {short(name)} is {got}, expected {wanted}")


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
    bias = "F16" if specs.get(f"{name}.bias", ("F32", ()))[0] == "F16" else "F32"
    expected: dict[str, Spec] = {f"{name}.cu_seqlens": ("I32", offsets), f"{name}.bias": (bias, (num_pairs,))}
    for kind, layout in zip(("keys", "values"), layouts, strict=True):
        pairs = f"{name}.{kind}"
        if layout is None:
            expected[pairs] = (kv_code, (num_pairs, head_dim))
            continue
        try:
            layout.check(head_dim)
        except InputError as error:
            raise Refused(f"{pairs!r} can't be: {error}") from None
        groups = _shape(specs, f"{pairs}.scales", 2)[0] if layout.axis == "channel" else num_pairs
        scales = (groups, head_dim if layout.axis == "channel" else head_dim // layout.group_size)
        expected[pairs] = ("U8", (num_pairs, head_dim * layout.bits // 8))
        expected |= {f"{pairs}.scales": ("F16", scales), f"{pairs}.zeros": ("F16", scales)}
        if layout.mixed:
            expected[f"{pairs}.widths"] = ("U8", (offsets[0] - 1, head_dim))
    return expected, (offsets[0] - 1, head_dim)


def _is_bias(name: str) -> bool:
    return name.endswith(".bias")


def _shape(specs: Mapping[str, Spec], name: str, num_dims: int) -> tuple[int, ...]:
    if name not in specs or len(specs[name][1]) != num_dims:
        raise Refused(f"tensor {name!r} is {specs.get(name, 'missing')}, expected {num_dims} dimensions")
    return specs[name][1]


def check_contents(tensors: Mapping[str, Tensor], windows: Sequence[int | None], storage: Storage) -> None:
    """Offsets, ids and keep mask fit together. `check_header` has passed."""
    for name in ("prefix_ids", "context_ids", "tail.token_ids"):
        if name in tensors and bool((tensors[name] < 0).any()):
            raise Refused(f"{name!r} has a negative token id")
    prefix_len, context_len = tensors["prefix_ids"].numel(), tensors["context_ids"].numel()
    full: dict[int, Tensor] = {}
    for i, name, layouts in storage.named():
        seqlens, window = _seqlens_in(tensors, name, layouts), windows[i]
        if i in storage.clusters:
            _check_clusters(tensors, name, seqlens)
        if window is None:
            full[i] = full[i] + seqlens if i in full else seqlens
        elif len(set(seqlens.tolist())) > 1 or int(seqlens[0]) > min(window, prefix_len + context_len):
            raise Refused(f"the heads of sliding-window layer {i} do not hold the same last tokens")
    held = torch.stack(list(full.values()))
    bits, num_entries = tensors["kept_bits"].cpu(), held.numel() * context_len
    kept = unpack_bits(bits, (*held.shape, context_len)).sum(dim=-1)
    if not torch.equal(kept + prefix_len, held):
        raise Refused("its keep mask does not match the pairs that its heads hold")
    if num_entries % 8 and int(bits[-1]) >> num_entries % 8:
        raise Refused("its keep mask has bits set after the last entry")


def _seqlens_in(tensors: Mapping[str, Tensor], name: str, layouts: Layouts) -> Tensor:
    """Pairs of each head of one level: [H] int64."""
    offsets, num_pairs = tensors[f"{name}.cu_seqlens"].cpu().long(), len(tensors[f"{name}.keys"])
    seqlens = offsets.diff()
    if int(offsets[0]) != 0 or int(offsets[-1]) != num_pairs or bool((seqlens < 0).any()):
        raise Refused(f"the offsets of {name!r} must rise from 0 to its {num_pairs} pairs")
    for kind, layout in zip(("keys", "values"), layouts, strict=True):
        if layout is not None and layout.axis == "channel":
            found, groups = len(tensors[f"{name}.{kind}.scales"]), layout.num_groups(tuple(offsets.tolist()))
            if found != groups:
                raise Refused(f"'{name}.{kind}.scales' has {found} groups, its heads have {groups}")
        if layout is not None and layout.mixed:
            _check_widths(tensors, f"{name}.{kind}.widths", layout.bits)
    return seqlens


def _check_widths(tensors: Mapping[str, Tensor], name: str, bits: int) -> None:
    """The bits of a head's channels fill its rows, or codes would be looked for behind them."""
    widths = tensors[name].cpu().long()
    if bool((widths > MAX_BITS).any()) or bool((widths.sum(dim=1) != bits * widths.shape[1]).any()):
        raise Refused(f"{name!r} must be 0 to {MAX_BITS} bits, {bits} on average in each head")


def _check_clusters(tensors: Mapping[str, Tensor], name: str, seqlens: Tensor) -> None:
    """Clusters have pairs, and no more than their heads have."""
    sizes, bounds = (tensors[f"{name}.{kind}"].cpu().long() for kind in ("cluster_sizes", "cu_clusters"))
    if int(bounds[0]) != 0 or int(bounds[-1]) != len(sizes) or bool((bounds.diff() < 0).any()):
        raise Refused(f"the clusters of {name!r} must rise from 0 to {len(sizes)} over its heads")
    before = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))[bounds]
    if bool((sizes < 1).any()) or bool((before.diff() > seqlens).any()):
        raise Refused(f"the clusters of {name!r} are empty, or hold more pairs than their heads")
