"""How bytes get to disk and back: the bytes of a file and their sha256, replacing it in one step, mapping it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvzip.errors import FileError, FormatError
from kvzip.store.layout import CODES, Spec
from kvzip.store.refusal import REMAKE, Refused, one_line

MAX_HEADER_NBYTES = 1 << 24

StrPath: TypeAlias = "str | os.PathLike[str]"
_safe_open: Callable[..., Any] = safe_open  # the library's own types are not complete


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; a copy only where it is strided or on a device."""
    return memoryview(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]


def digest(metadata: Mapping[str, str], specs: Mapping[str, Spec], tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes of all tensors, and all metadata but `sha256` itself."""
    names = sorted(specs)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # hashlib releases the GIL
        sums = list(pool.map(lambda name: hashlib.sha256(bytes_of(tensors[name])).hexdigest(), names))
    texts = sorted(item for item in metadata.items() if item[0] != "sha256")
    lines = [f"meta {key} {hashlib.sha256(text.encode()).hexdigest()}\n" for key, text in texts]
    for name, found in zip(names, sums, strict=True):
        lines.append(f"tensor {name} {specs[name][0]} {'x'.join(map(str, specs[name][1]))} {found}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def header_bytes(metadata: dict[str, str], specs: Mapping[str, Spec], tensors: Mapping[str, Tensor]) -> bytes:
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
        raise Refused(f"its header takes {len(text)} bytes, allowed: {MAX_HEADER_NBYTES}")
    return len(text).to_bytes(8, "little") + text


def replace_file(path: StrPath, head: bytes, tensors: Iterable[Tensor]) -> None:
    """Put a file of this header and these tensors at `path`, in one step, or leave what is there."""
    target = os.path.realpath(path)
    if os.path.exists(target) and not os.path.isfile(target):  # a folder; or a device, which must stay one
        raise OSError(errno.EINVAL, "Not a regular file")
    folder = os.path.dirname(target)
    temporary = os.path.join(folder, f".kvzip-{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.writelines(chain([head], map(bytes_of, tensors)))
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


def store_tensors(
    path: StrPath, metadata: dict[str, str], specs: Mapping[str, Spec], tensors: Mapping[str, Tensor]
) -> int:
    """Write a file of this metadata, with the digest in it, and these tensors, in their order; returns its bytes.

    Raises Refused for a header that is too long, FileError if the folder or the disk refuses.
    """
    whole = metadata | {"sha256": digest(metadata, specs, tensors)}
    head = header_bytes(whole, specs, tensors)
    nbytes = len(head) + sum(tensor.nbytes for tensor in tensors.values())
    try:
        replace_file(path, head, tensors.values())
    except (OSError, ValueError) as error:
        raise os_error(f"write {nbytes} bytes to", path, error) from error
    return nbytes


@contextmanager
def opened(path: StrPath, remake: str = REMAKE) -> Iterator[Any]:
    """The mapped file. What goes wrong inside leaves as FileError or FormatError, a line that names the file.

    remake: the remedy where the error has none of its own.
    safe_open opens its path twice. By its descriptor, where the system has names for these, both are the same
    file even while another process puts a new one in its place.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would block
            raise OSError(errno.EINVAL, "Not a regular file")
        with open(path, "rb") as file:
            size, header_len = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
            if not 2 <= header_len <= min(size - 8, MAX_HEADER_NBYTES):
                raise Refused("it is cut short, or not a safetensors file")
            name = f"/dev/fd/{file.fileno()}"
            with _safe_open(name if os.path.exists(name) else os.fspath(path), framework="pt") as mapped:
                yield mapped
    except OSError as error:
        raise os_error("read", path, error) from error
    except (Refused, SafetensorError, RuntimeError, TypeError, ValueError, OverflowError) as error:
        remedy = getattr(error, "remedy", None) or remake
        raise FormatError(f"can't use {os.fspath(path)!r}: {one_line(error)}; {remedy}") from error


def specs_of(tensors: Mapping[str, Tensor]) -> dict[str, Spec]:
    """Dtype and shape of tensors that are to be written."""
    return {name: (CODES.get(t.dtype, str(t.dtype)), tuple(t.shape)) for name, t in tensors.items()}


def specs_in(mapped: Any) -> dict[str, Spec]:
    """Dtype and shape of each tensor by name."""
    slices = ((name, mapped.get_slice(name)) for name in mapped.keys())  # noqa: SIM118
    return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices}


def os_error(action: str, path: StrPath, error: OSError | ValueError) -> FileError:
    """What the system refused, as an error that names the path and the remedy."""
    is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "free some space or use another disk" if is_full else "check the path, its folder and permissions"
    reason = getattr(error, "strerror", None) or one_line(error)
    return FileError(f"can't {action} {os.fspath(path)!r}: {reason}; {remedy}")
