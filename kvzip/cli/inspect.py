"""`kvzip inspect`: what a file of kvzip kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvzip.cli import ending_at_once
from kvzip.cli.border import say
from kvzip.cli.compress import check_writable
from kvzip.cli.export import show
from kvzip.cli.options import File, Json, ModelOrNone, Quiet, examples
from kvzip.cli.screen import Bars, out, print_json
from kvzip.errors import InputError

if TYPE_CHECKING:
    from kvzip.context import RaggedContext

EPILOG = examples(
    "kvzip inspect book.kvz",
    "kvzip inspect book.kvz --html book.html    a page with a slider over the keep ratio",
    "kvzip inspect book.kvz --json | jq .keep_ratio",
)


def inspect(
    file: File,
    html: Annotated[str | None, typer.Option(metavar="FILE", help="Write one self-contained page instead.")] = None,
    model: ModelOrNone = None,
    no_text: Annotated[bool, typer.Option("--no-text", help="Leave the text out.")] = False,
    max_tokens: Annotated[int, typer.Option(metavar="N", min=0, help="Tokens of the text to show.")] = 800,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what a compressed text kept.

    Facts, a heat map of layers and heads, a histogram, and the text shaded by importance.

    The text needs the tokenizer of the model on this machine; the rest needs no model at all.

    Of a portable file, the facts that `kvzip export` prints.
    """
    if html is not None and as_json:
        raise typer.BadParameter("give either --html or --json, not both")
    if html is not None:
        check_writable(Path(html))
    if inspect_portable(file, html, as_json=as_json, quiet=quiet):
        return
    with Bars(quiet) as bars, bars.step(f"Opening {file}"):
        context, facts = open_file(file)
        texts = None if no_text or as_json else texts_of(context, model, quiet=quiet)
    if as_json:
        from kvzip.inspect.summary import inspect_json

        print_json({"path": file, **facts, **inspect_json(context)})
    elif html is not None:
        write_page(context, texts, html)
    else:
        draw(context, texts, max_tokens)


def inspect_portable(file: str, html: str | None, *, as_json: bool, quiet: bool) -> bool:
    """Print what a portable file is, all of it verified; False for a .kvz, of which nothing is printed."""
    with ending_at_once():
        from kvzip.store import portable

    if not portable.is_portable(file):
        return False
    if html is not None:
        raise InputError(f"{file!r} is portable and has no ranks to draw: inspect the .kvz that it was made of")
    with Bars(quiet) as bars, bars.step(f"Opening {file}"):
        portable.read(file)
    show(portable.read_info(file), Path(file), as_json=as_json)
    return True


def open_file(file: str) -> tuple[RaggedContext, dict[str, Any]]:
    """The context, and what is known of the file itself."""
    with ending_at_once():
        from kvzip import store

    context, tail = store.read(file)
    facts = {"format_version": store.read_info(file).version, "file_nbytes": os.path.getsize(file)}
    return context, {**facts, "num_turns": None if tail is None else len(tail.turns)}


def texts_of(context: RaggedContext, model: str | None, *, quiet: bool) -> list[str] | None:
    """The text of each token, or None where the tokenizer is not on this machine."""
    from kvzip.cli.loading import load_tokenizer
    from kvzip.inspect.summary import token_texts

    name = model or context.info.model
    tokenizer = load_tokenizer(name)
    if tokenizer is None:
        if not quiet:
            say(f"kvzip: the text is left out: the tokenizer of {name!r} is not on this machine; name it with -m")
        return None
    return token_texts(tokenizer, context.context_ids.tolist())


def write_page(context: RaggedContext, texts: list[str] | None, path: str) -> None:
    from kvzip.inspect.html import write_html

    ids = context.context_ids.tolist()
    write_html(context, texts or [f"[{i}] " for i in ids], path)
    print(f"wrote {path}")


def draw(context: RaggedContext, texts: list[str] | None, max_tokens: int) -> None:
    from kvzip.inspect.terminal import render

    render(context, texts or [""] * context.context_len, out(), max_tokens=max_tokens if texts else 0)
