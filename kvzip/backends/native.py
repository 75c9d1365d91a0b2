"""The compiled CPU backend: `ragged.c`, built once by the system's C compiler into the cache folder.

Where there is no compiler, or the result can't be loaded, `auto` takes the `cpu` backend, which needs none.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kvzip.backends.cpu import CPUBackend
from kvzip.backends.reference import fold_batch, unfold_batch
from kvzip.context import Pairs, RaggedLayer
from kvzip.errors import BackendError
from kvzip.models.cache import cache_dir

PART = 512  # keys of a part, as in ragged.c
MAX_DIM = 512  # as in ragged.c
MAX_ROWS = 512  # query rows of a KV head; beyond that the matrix products of the `cpu` backend are faster
MAX_CODED_ROWS = 64  # the same for quantized pairs, which are read anew for each eight rows
MAX_PAGED = (512, 256, 32)  # size of a head, tokens of a block, query heads of a KV head, as in paged.c
SOURCES = ("ragged.c", "ragged_rows.h", "paged.c")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC")
Kernel = Callable[..., None]


class Store(ctypes.Structure):
    """As in ragged.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("data", "scales", "zeros", "widths", "end")),
        *((name, ctypes.c_int32) for name in ("bits", "group_size", "per_channel", "rotated")),
    )

    @classmethod
    def of(cls, pairs: Pairs, widths: Tensor | None) -> Store:
        """widths: [Hkv, D] where a row is a string of bits; it must live as long as this."""
        if isinstance(pairs, Tensor):
            return cls(data=pairs.data_ptr(), bits=32)
        layout = pairs.layout
        return cls(
            data=pairs.codes.data_ptr(),
            scales=pairs.scales.data_ptr(),
            zeros=pairs.zeros.data_ptr(),
            widths=None if widths is None else widths.data_ptr(),
            end=pairs.codes.data_ptr() + pairs.codes.nbytes,
            bits=layout.bits,
            group_size=layout.group_size,
            per_channel=layout.axis == "channel",
            rotated=pairs.shape[1] & -pairs.shape[1] if layout.rotated else 0,
        )


class Bias(ctypes.Structure):
    """As in ragged.c."""

    _fields_ = (("data", ctypes.c_void_p), ("bits", ctypes.c_int32))

    @classmethod
    def of(cls, bias: Tensor | None) -> Bias:
        return cls(None, 0) if bias is None else cls(bias.data_ptr(), 8 * bias.itemsize)


class Level(ctypes.Structure):
    """As in ragged.c."""

    _fields_ = (("k", Store), ("v", Store), ("bias", Bias), ("offsets", ctypes.c_void_p))


@dataclass(frozen=True)
class Levels:
    """What the kernel is told of a layer.

    levels: a C array, or None where the kernel can't read it.  widths: tensors that it points to, beside the layer's.
    """

    levels: ctypes.Array[Level] | None
    num_pairs: int
    is_coded: bool
    widths: Sequence[Tensor | None] = ()

    @classmethod
    def of(cls, layer: RaggedLayer) -> Levels:
        tensors = [t for level in layer.levels for t in _tensors(level)]
        kinds = {t.dtype for level in layer.levels for t in (level.keys, level.values)}
        is_coded = any(level.is_quantized for level in layer.levels)
        readable = kinds == {torch.float32} and all(t.is_cpu and t.is_contiguous() for t in tensors)
        if not readable or layer.head_dim > MAX_DIM:
            return cls(None, 0, is_coded)
        found, kept = list[Level](), list[Tensor | None]()
        for level in layer.levels:
            widths = [_widths_of(pairs, layer.num_kv_heads) for pairs in (level.keys, level.values)]
            stores = map(Store.of, (level.keys, level.values), widths)
            found.append(Level(*stores, Bias.of(level.bias), level.cu_seqlens.data_ptr()))
            kept += widths
        return cls((Level * len(found))(*found), sum(level.offsets[-1] for level in layer.levels), is_coded, kept)


def _widths_of(pairs: Pairs, num_heads: int) -> Tensor | None:
    """Bits of each channel [Hkv, D] of codes that are strings of bits."""
    if isinstance(pairs, Tensor) or not pairs.layout.is_stream:
        return None
    return pairs.all_widths(num_heads).contiguous()


_LEVELS: WeakKeyDictionary[RaggedLayer, Levels] = WeakKeyDictionary()  # layers never change, nor do their addresses


def levels_of(layer: RaggedLayer) -> Levels:
    """What the kernel is told of a layer, made at its first use."""
    found = _LEVELS.get(layer)
    if found is None:
        found = _LEVELS[layer] = Levels.of(layer)
    return found


def _tensors(level: RaggedLayer) -> Iterator[Tensor]:
    for pairs in (level.keys, level.values):
        yield from (pairs,) if isinstance(pairs, Tensor) else (pairs.codes, pairs.scales, pairs.zeros)
    yield level.cu_seqlens
    if level.bias is not None:
        yield level.bias


class NativeBackend(CPUBackend):
    """Dense keys as the `cpu` backend does, ragged ones by the compiled kernel; float32, other dtypes as `cpu` too.

    Raises BackendError where the kernel can't be compiled or loaded.
    """

    def __init__(self) -> None:
        self._kernel = load_kernel()

    def attend_ragged(
        self, query: Tensor, layer: RaggedLayer, *, scale: float, softcap: float | None = None
    ) -> tuple[Tensor, Tensor]:
        rows, known = fold_batch(query, layer.num_kv_heads), levels_of(layer)
        if softcap is not None or not _fits(rows, known):
            return super().attend_ragged(query, layer, scale=scale, softcap=softcap)
        return unfold_batch(*self._attend(rows, known, scale), query)

    def decode(
        self,
        query: Tensor,
        layer: RaggedLayer,
        keys: Tensor,
        values: Tensor,
        *,
        scale: float,
        softcap: float | None = None,
    ) -> Tensor:
        rows, known = fold_batch(query, layer.num_kv_heads), levels_of(layer)
        if softcap is not None or not _fits(rows, known) or not _fits_tail(keys, values):
            return super().decode(query, layer, keys, values, scale=scale, softcap=softcap)
        return self._attend(rows, known, scale, (keys, values))[0].view(query.shape)

    def _attend(
        self, rows: Tensor, known: Levels, scale: float, tail: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Rows [Hkv, R, D] over the segments of the layer and, if given, a tail [1, Hkv, S_tail, D]."""
        num_kv_heads, num_rows, head_dim = rows.shape
        assert known.levels is not None
        num_levels = len(known.levels)
        keys, values = tail or (rows, rows)  # read only where there are tail keys
        tail_len = keys.shape[2] if tail else 0
        num_parts = known.num_pairs // PART + num_kv_heads * (num_levels + 1 + tail_len // PART)
        scratch = rows.new_empty(num_parts, num_rows, head_dim + 1)
        out, lse = torch.empty_like(rows), rows.new_empty(num_kv_heads, num_rows)
        self._kernel(
            rows.data_ptr(), known.levels, num_levels, keys.data_ptr(), values.data_ptr(), keys.stride(1), tail_len,
            num_kv_heads, num_rows, head_dim, scale, scratch.data_ptr(), out.data_ptr(), lse.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return out, lse


def _fits(rows: Tensor, known: Levels) -> bool:
    """Whether the kernel takes these: it reads memory as it lies."""
    plain = rows.dtype is torch.float32 and rows.is_cpu and rows.is_contiguous()
    return plain and known.levels is not None and 0 < rows.shape[1] <= (MAX_CODED_ROWS if known.is_coded else MAX_ROWS)


def _fits_tail(keys: Tensor, values: Tensor) -> bool:
    """Whether each head's keys and values lie row after row, heads equally far apart in both."""
    plain = keys.dtype is torch.float32 and keys.is_cpu
    return plain and keys.stride() == values.stride() and keys.stride()[2:] == (keys.shape[3], 1)


def attend_paged(
    query: Tensor, cache: Tensor, blocks: Tensor, lengths: Tensor, *, scale: float, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """One new token of each of R requests over its tail in a paged cache; float32, contiguous, on the CPU.

    query: [R, Hq, D].  cache: [N, Hkv, size, 2 * D], whose blocks hold keys as [D, size], then values as [size, D].
    blocks: [R, n] int64, of each tail.  lengths: [R] int64, tokens of it, at least 1.  window: the last tokens that are
    seen, or None.  Returns ([R, Hq, D], [R, Hq]), output and log-sum-exp.  Raises BackendError.
    """
    num_requests, num_heads, dim = query.shape
    _, num_kv_heads, size, _ = cache.shape
    assert all(t.is_contiguous() for t in (query, cache, blocks, lengths))
    out, lse = torch.empty_like(query), query.new_empty(num_requests, num_heads)
    load_paged_kernel()(
        query.data_ptr(), cache.data_ptr(), blocks.data_ptr(), lengths.data_ptr(),
        num_requests, blocks.shape[1], num_kv_heads, num_heads // num_kv_heads, size, dim, window or 0, scale,
        out.data_ptr(), lse.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out, lse


def fits_paged(cache: Tensor, num_heads: int) -> bool:
    """Whether `attend_paged` takes a cache [N, Hkv, size, 2 * D] and that many query heads."""
    sizes = cache.shape[3] // 2, cache.shape[2], num_heads // cache.shape[1]
    plain = cache.dtype is torch.float32 and cache.is_cpu and cache.is_contiguous()
    return plain and all(size <= most for size, most in zip(sizes, MAX_PAGED, strict=True))


def _library() -> ctypes.CDLL:
    """The kernels, compiled now if they were not before. Raises BackendError."""
    try:
        path = _library_path()
        if not path.exists():
            _compile(path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BackendError(
            f"the kernel of the native backend can't be built or loaded ({reason}): "
            "install a C compiler with OpenMP (gcc), or take backend='cpu', which needs none"
        ) from error


@lru_cache(maxsize=1)
def load_paged_kernel() -> Kernel:
    """The function `kvzip_attend_paged` of paged.c. Raises BackendError."""
    kernel: Kernel = _library().kvzip_attend_paged
    pointer, number = ctypes.c_void_p, ctypes.c_int
    kernel.argtypes = [*[pointer] * 4, *[number] * 7, ctypes.c_float, *[pointer] * 2, number]  # type: ignore[attr-defined]
    kernel.restype = None  # type: ignore[attr-defined]
    return kernel


@lru_cache(maxsize=1)
def load_kernel() -> Kernel:
    """The function `kvzip_attend_ragged` of ragged.c. Raises BackendError."""
    kernel: Kernel = _library().kvzip_attend_ragged
    pointer, number = ctypes.c_void_p, ctypes.c_int
    kernel.argtypes = [  # type: ignore[attr-defined]
        *[pointer] * 2,
        number,
        *[pointer] * 2,
        ctypes.c_int64,
        *[number] * 4,
        ctypes.c_float,
        *[pointer] * 3,
        number,
    ]
    kernel.restype = None  # type: ignore[attr-defined]
    return kernel


def _library_path() -> Path:
    """One library for each source, compiler and kind of machine that may share the cache folder."""
    texts = [(Path(__file__).parent / name).read_text(encoding="utf-8") for name in SOURCES]
    key = "\0".join([*texts, _compiler() or "", *FLAGS, platform.machine(), _cpu_features()])
    return cache_dir() / "kernels" / f"ragged-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"


def _compile(path: Path) -> None:
    """Build the library at `path`, whole or not at all; others may do the same at the same time."""
    compiler = _compiler()
    if compiler is None:
        raise OSError("no C compiler was found")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        library, codes = Path(folder) / "kernels.so", []
        for source in (name for name in SOURCES if name.endswith(".c")):
            codes.append(str(Path(folder) / f"{source}.o"))
            _run([compiler, *FLAGS, "-c", str(Path(__file__).parent / source), "-o", codes[-1]])
        # The OpenMP functions are left to the runtime that torch has loaded: two pools would fight for the cores.
        _run([compiler, "-shared", *codes, "-o", str(library)])
        os.replace(library, path)


def _run(command: list[str]) -> None:
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if run.returncode != 0:
        raise OSError(run.stderr.strip() or f"{command[0]} ended with status {run.returncode}")


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CC") or "cc")


def _cpu_features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
