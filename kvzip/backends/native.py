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
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from kvzip.backends.cpu import CPUBackend
from kvzip.backends.reference import fold_batch, unfold_batch
from kvzip.context import RaggedLayer
from kvzip.errors import BackendError
from kvzip.models.cache import cache_dir

PART = 512  # keys of a part, as in ragged.c
MAX_DIM = 512  # as in ragged.c
MAX_ROWS = 512  # query rows of a KV head; beyond that the matrix products of the `cpu` backend are faster
SOURCES = ("ragged.c", "ragged_rows.h")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC")
Kernel = Callable[..., None]


class NativeBackend(CPUBackend):
    """Dense keys as the `cpu` backend does, ragged ones by the compiled kernel; float32, other dtypes as `cpu` too.

    Raises BackendError where the kernel can't be compiled or loaded.
    """

    def __init__(self) -> None:
        self._kernel = load_kernel()

    def attend_ragged(
        self, query: Tensor, layer: RaggedLayer, *, scale: float, softcap: float | None = None
    ) -> tuple[Tensor, Tensor]:
        rows = fold_batch(query, layer.num_kv_heads)
        if softcap is not None or not _fits(rows, layer):
            return super().attend_ragged(query, layer, scale=scale, softcap=softcap)
        return unfold_batch(*self._attend(rows, layer, scale), query)

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
        rows = fold_batch(query, layer.num_kv_heads)
        if softcap is not None or not _fits(rows, layer) or not _fits_tail(keys, values):
            return super().decode(query, layer, keys, values, scale=scale, softcap=softcap)
        return self._attend(rows, layer, scale, (keys, values))[0].view(query.shape)

    def _attend(
        self, rows: Tensor, layer: RaggedLayer, scale: float, tail: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Rows [Hkv, R, D] over the segments of the layer and, if given, a tail [1, Hkv, S_tail, D]."""
        num_kv_heads, num_rows, head_dim = rows.shape
        keys, values = tail or (rows, rows)  # read only where there are tail keys
        tail_len = keys.shape[2] if tail else 0
        num_parts = (layer.keys.shape[0] + num_kv_heads * tail_len) // PART + 2 * num_kv_heads
        scratch = rows.new_empty(num_parts, num_rows, head_dim + 1)
        out, lse = torch.empty_like(rows), rows.new_empty(num_kv_heads, num_rows)
        bias = None if layer.bias is None else layer.bias.data_ptr()
        self._kernel(
            rows.data_ptr(), layer.keys.data_ptr(), layer.values.data_ptr(), bias, layer.cu_seqlens.data_ptr(),
            keys.data_ptr(), values.data_ptr(), keys.stride(1), tail_len, num_kv_heads, num_rows, head_dim, scale,
            scratch.data_ptr(), out.data_ptr(), lse.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out, lse


def _fits(rows: Tensor, layer: RaggedLayer) -> bool:
    """Whether the kernel takes these: it reads memory as it lies."""
    tensors = (rows, layer.keys, layer.values) if layer.bias is None else (rows, layer.keys, layer.values, layer.bias)
    plain = all(t.dtype is torch.float32 and t.is_cpu and t.is_contiguous() for t in tensors)
    return plain and 0 < rows.shape[1] <= MAX_ROWS and rows.shape[2] <= MAX_DIM


def _fits_tail(keys: Tensor, values: Tensor) -> bool:
    """Whether each head's keys and values lie row after row, heads equally far apart in both."""
    plain = keys.dtype is torch.float32 and keys.is_cpu
    return plain and keys.stride() == values.stride() and keys.stride()[2:] == (keys.shape[3], 1)


@lru_cache(maxsize=1)
def load_kernel() -> Kernel:
    """The function `kvzip_attend_ragged` of ragged.c, compiled now if it was not before. Raises BackendError."""
    try:
        path = _library_path()
        if not path.exists():
            _compile(path)
        kernel: Kernel = ctypes.CDLL(str(path)).kvzip_attend_ragged
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BackendError(
            f"the kernel of the native backend can't be built or loaded ({reason}): "
            "install a C compiler with OpenMP (gcc), or take backend='cpu', which needs none"
        ) from error
    pointer, number = ctypes.c_void_p, ctypes.c_int
    kernel.argtypes = [  # type: ignore[attr-defined]
        *[pointer] * 7,
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
        code, library = Path(folder) / "ragged.o", Path(folder) / "ragged.so"
        _run([compiler, *FLAGS, "-c", str(Path(__file__).parent / "ragged.c"), "-o", str(code)])
        # The OpenMP functions are left to the runtime that torch has loaded: two pools would fight for the cores.
        _run([compiler, "-shared", str(code), "-o", str(library)])
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
