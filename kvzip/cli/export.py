"""`kvzip export`: a .kvz file in a layout of other engines."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvzip.cli.compress import check_ours, check_writable
from kvzip.cli.options import Device, DType, File, Json, ModelOrNone, Quiet, examples
from kvzip.cli.screen import Bars, print_facts, print_json, size

if TYPE_CHECKING:
    from kvzip.store.portable import PortableInfo

EPILOG = examples(
    "kvzip export book.kvz --portable",
    "kvzip export book.kvz --portable --keep-ratio 0.7 -o book.kvp.safetensors",
)
SUFFIX = ".kvp.safetensors"
INFO_KEYS = (
    "model",
    "method",
    "dtype",
    "keep_ratio_asked",
    "keep_ratio",
    "full_kv_nbytes",
    "prefill_s",
    "total_s",
    "loss",
)


def export(
    file: File,
    portable: Annotated[
        bool, typer.Option("--portable", help="The same count of KV pairs in every head: the one layout there is.")
    ] = False,
    keep_ratio: Annotated[
        float | None,
        typer.Option(
            "-r", "--keep-ratio", metavar="R", help="Share of the KV pairs to keep.  [default: the file's own]"
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", metavar=f"FILE{SUFFIX}", help="Default: FILE's name, in this folder."),
    ] = None,
    model: ModelOrNone = None,
    no_certificate: Annotated[
        bool, typer.Option("--no-certificate", help="Do not measure the loss; read the text only if pairs are missing.")
    ] = False,
    force: Annotated[bool, typer.Option("-f", "--force", help="Overwrite a file that is not portable.")] = False,
    dtype: DType = "auto",
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a compressed text for an inference engine that counts one slot a token for all heads.

    Every head gets the same count of pairs, which loses more than the counts of their own that a .kvz has; how much is
    measured and printed. The text is read again, because evicted pairs are not in the file.
    """
    if not portable:
        raise typer.BadParameter("name the layout: --portable")
    target = output_path(file, output, force=force)
    with Bars(quiet) as bars:
        from kvzip.cli.loading import load_llm, model_of, start

        start(bars)
        check_choice(file, keep_ratio)
        context = load_llm(model_of(file, model), bars, dtype=dtype, device=device).open(file)
        found = context.export(target, keep_ratio, certify=not no_certificate, progress=bars)
    show(found, target, as_json=as_json)


def show(found: PortableInfo, path: Path, *, as_json: bool) -> None:
    """What is known of a portable file, as `export` and `inspect` print it."""
    if as_json:
        print_json(report(found, path))
    else:
        print_summary(found, path)


def output_path(file: str, output: str | None, *, force: bool = False) -> Path:
    """Where the file goes, checked before the long work. Raises FileError."""
    path = Path(output) if output else Path(f"{Path(file).stem}{SUFFIX}")
    check_writable(path)
    if path.exists() and not force:
        check_ours(path, "portable", "kvzip-portable")
    return path


def check_choice(file: str, keep_ratio: float | None) -> None:
    """Refuse, before a model is loaded, what can't be exported. Raises FileError, FormatError or InputError."""
    from kvzip import store
    from kvzip.portable import count_for, uniform_mask

    context, _ = store.read(file, verify=False)
    uniform_mask(context, count_for(context, keep_ratio))


def report(found: PortableInfo, path: Path) -> dict[str, Any]:
    """What `--json` prints. The keys are a contract."""
    sizes = {name: getattr(found, name) for name in ("num_pairs", "prefix_len", "logical_len", "kv_nbytes")}
    info, origin = found.info.to_dict(), found.origin
    own = {name: getattr(origin, name) for name in ("method", "keep_ratio", "kv_nbytes", "loss", "left_out")}
    known = {name: info[name] for name in INFO_KEYS}
    return {
        "path": str(path),
        "file_nbytes": os.path.getsize(path),
        **sizes,
        **known,
        "sha256": found.sha256,
        "origin": own,
    }


def print_summary(found: PortableInfo, path: Path) -> None:
    from kvzip.inspect.summary import format_percent, loss_line, one_line

    info, origin = found.info, found.origin
    slots = (
        f"{found.num_pairs:,} in every head, {found.prefix_len:,} of them the prefix, for {found.logical_len:,} tokens"
    )
    kept = f"{format_percent(info.keep_ratio)} of the KV pairs, the .kvz {format_percent(origin.keep_ratio)}"
    memory = f"{size(found.kv_nbytes)}, the .kvz {size(origin.kv_nbytes)}, the full cache {size(info.full_kv_nbytes)}"
    losses = [loss_line(loss) if loss else "not measured" for loss in (info.loss, origin.loss)]
    facts = [("Model", one_line(info.model)), ("Slots", slots), ("Kept", kept), ("Memory", memory)]
    facts += [("Loss", losses[0]), ("Of the .kvz", losses[1])]
    if origin.left_out:
        facts.append(("Left out", f"{', '.join(map(one_line, origin.left_out))}: the pairs are plain"))
    print_facts([*facts, ("File", f"{path}, {size(os.path.getsize(path))}")])
