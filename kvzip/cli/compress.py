"""`kvzip compress`: a text becomes a .kvz file."""

from __future__ import annotations

import os
import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvzip.cli.options import Device, DType, Json, Model, Quiet, complete_method, examples
from kvzip.cli.screen import Bars, print_facts, print_json, size
from kvzip.cli.texts import STDIN, read_text
from kvzip.errors import BudgetError, FileError, InputError

if TYPE_CHECKING:
    from kvzip.compressed import CompressedContext
    from kvzip.llm import LLM
    from kvzip.options import CompressOptions

EPILOG = examples(
    "kvzip compress book.txt -m qwen2.5-coder-0.5b",
    "kvzip compress book.txt -m smollm2-135m --keep-ratio 0.5 -o half.kvz",
    "kvzip compress book.txt -m smollm2-135m --budget 16MiB",
    "kvzip compress book.txt -m qwen2.5-coder-0.5b --method kvzip:small",
    "kvzip compress book.txt -m qwen2.5-coder-0.5b --max-loss 0.05",
    "man bash | col -b | kvzip compress - -m qwen2.5-coder-0.5b -o bash.kvz",
)
JSON_KEYS = (
    "model", "method", "dtype", "context_len", "prefix_len", "keep_ratio_asked", "budget_asked", "keep_ratio",
    "kv_nbytes", "full_kv_nbytes", "prefill_s", "score_s", "total_s", "peak_rss_bytes", "loss", "chosen",
)  # fmt: skip
SHOWN = ("Model", "Method", "Context", "Kept", "Chosen", "Memory", "Loss", "Time")


def compress(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A UTF-8 text; - reads standard input.")],
    model: Model,
    keep_ratio: Annotated[
        str | None,
        typer.Option(
            "-r",
            "--keep-ratio",
            metavar="R",
            help="Share of the KV pairs to keep, 0 < R <= 1, or auto: the smallest cache within --max-loss.  "
            "[default: that of a recipe, or 0.3; none where the method decides]",
        ),
    ] = None,
    max_loss: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="Search for the smallest cache that loses at most X nats a token.  [auto: 0.05]"
        ),
    ] = None,
    max_bytes: Annotated[
        str | None, typer.Option(metavar="AMOUNT", help="Search for the best cache within 64MiB, or within 8x.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="AMOUNT", help="Instead: 100000 KV pairs, 64MiB, or 8x less than in 16 bits.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="A name of `kvzip methods`: how to choose the pairs.", autocompletion=complete_method
        ),
    ] = "kvzip",
    output: Annotated[
        str | None, typer.Option("-o", "--output", metavar="FILE.kvz", help="Default: FILE's name, in this folder.")
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt.")] = None,
    instruction: Annotated[str | None, typer.Option(metavar="TEXT", help="Stands before the text.")] = None,
    faithful: Annotated[bool, typer.Option("--faithful", help="The choices of the paper's own code.")] = False,
    chunk_len: Annotated[int, typer.Option(metavar="N", help="Tokens that the model repeats at a time.")] = 2000,
    replay_scope: Annotated[
        str, typer.Option(metavar="SCOPE", help="What a repeated chunk sees: global, local, auto (local if long).")
    ] = "auto",
    no_certificate: Annotated[
        bool, typer.Option("--no-certificate", help="Do not measure the loss on the text itself at the end.")
    ] = False,
    force: Annotated[bool, typer.Option("-f", "--force", help="Overwrite a file that is not a .kvz.")] = False,
    dtype: DType = "auto",
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compress a text once, to ask it any time."""
    if keep_ratio is not None and budget is not None:
        raise typer.BadParameter("give either --keep-ratio or --budget, not both")
    target = output_path(file, output, force=force)
    text = read_text(file)
    source = "standard input" if file == STDIN else Path(file).name
    with Bars(quiet) as bars:
        from kvzip.cli.loading import check_can_fit, load_llm, start

        start(bars)
        options = make_options(
            keep_ratio, budget, method=method, faithful=faithful, chunk_len=chunk_len, replay_scope=replay_scope,
            certify=not no_certificate, max_loss=max_loss, max_bytes=max_bytes,
        )  # fmt: skip
        llm = load_llm(model, bars, dtype=dtype, device=device)
        check_can_fit(llm, text)
        texts = {"system": system, "instruction": instruction, "source": source}
        context = run(llm, text, options, texts, bars)
        with bars.step(f"Writing {target}"):
            nbytes = context.save(target)
    if as_json:
        print_json(report(context, target, nbytes))
    else:
        print_summary(context, target, nbytes)


def make_options(keep_ratio: str | None, budget: str | None, **options: Any) -> CompressOptions:
    """The options, checked before the long work. Raises BudgetError, UnknownNameError or InputError."""
    from kvzip.options import AUTO, CompressOptions

    ratio: float | str | None = keep_ratio
    if keep_ratio is not None and keep_ratio != AUTO:
        try:
            ratio = float(keep_ratio)
        except ValueError as error:
            raise BudgetError(
                f"keep ratio {keep_ratio!r} is no number: give 0 < r <= 1, the fraction of KV pairs to keep, or auto"
            ) from error

    amount: int | str | None = budget
    if budget is not None and budget.strip().lstrip("+-").isdecimal():
        amount = int(budget)
    return CompressOptions(keep_ratio=ratio, budget=amount, **options)


def run(llm: LLM, text: str, options: CompressOptions, texts: dict[str, str | None], bars: Bars) -> CompressedContext:
    return llm.compress(
        text,
        options.keep_ratio,
        budget=options.budget,
        method=options.method,
        faithful=options.faithful,
        chunk_len=options.chunk_len,
        replay_scope=options.replay_scope,
        certify=options.certify,
        max_loss=options.max_loss,
        max_bytes=options.max_bytes,
        progress=bars,
        **texts,
    )


def output_path(file: str, output: str | None, *, force: bool = False) -> Path:
    """Where the file goes, checked before the long work.

    Raises FileError where nothing can be written, or where something other than a .kvz file would be lost.
    """
    path = Path(output) if output else Path("stdin.kvz" if file == STDIN else f"{Path(file).stem}.kvz")
    if file != STDIN and os.path.exists(path) and os.path.exists(file) and os.path.samefile(path, file):
        raise InputError(f"{str(path)!r} would overwrite the text itself: name another file with -o")
    check_writable(path)
    if path.exists() and not force:
        check_ours(path)
    return path


def check_writable(path: Path) -> None:
    """Raises FileError unless a file can be made there."""
    if path.is_dir():
        raise FileError(f"{str(path)!r} is a folder: name a file in it with -o")
    folder = path.parent
    if not folder.is_dir():
        raise FileError(f"the folder {str(folder)!r} does not exist: make it first, or name another file with -o")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        where = f"can't write in the folder {str(folder)!r} ({error.strerror})"
        raise FileError(f"{where}: name a file elsewhere with -o") from error


def check_ours(path: Path, kind: str = ".kvz", file_format: str = "kvzip") -> None:
    """Raises FileError unless the file looks like one of that format that kvzip wrote.  kind: as the error calls it."""
    with path.open("rb") as file:
        head = file.read(1 << 16)
    if f'"format":"{file_format}"'.encode() not in head and head:
        raise FileError(f"{str(path)!r} exists and is not a {kind} file: name another with -o, or add --force")


def report(context: CompressedContext, path: Path, nbytes: int) -> dict[str, Any]:
    """What `--json` prints. The keys are a contract."""
    stats = context.stats
    return {"path": str(path), "file_nbytes": nbytes, **{key: stats[key] for key in JSON_KEYS}}


def print_summary(context: CompressedContext, path: Path, nbytes: int) -> None:
    from kvzip.inspect.summary import facts

    known = dict(facts(context.data))
    print_facts([*((name, known[name]) for name in SHOWN if name in known), ("File", f"{path}, {size(nbytes)}")])
    print(f'\nAsk it: kvzip ask {shlex.quote(str(path))} "your question"')
