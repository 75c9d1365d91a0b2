"""`kvzip models`: the models that have a short name, and getting one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvzip.cli.border import Command
from kvzip.cli.options import Json, Quiet, complete_model, examples
from kvzip.cli.screen import Bars, out, print_json, size

if TYPE_CHECKING:
    from kvzip.models.catalogue import CatalogueEntry

EPILOG = examples("kvzip models", "kvzip models pull smollm2-135m")

app = typer.Typer(invoke_without_command=True, rich_markup_mode=None, epilog=EPILOG)


@app.callback()
def models(context: typer.Context, as_json: Json = False) -> None:
    """List the models with a short name, or pull one.

    Hub ids, model folders and .gguf files work as well."""
    if context.invoked_subcommand is not None:
        return
    from kvzip.cli.border import border

    with border():
        rows = [describe(entry) for entry in catalogue()]
        if as_json:
            print_json(rows)
        else:
            show(rows)


@app.command(cls=Command, epilog=examples("kvzip models pull qwen2.5-coder-0.5b"))
def pull(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A name of `kvzip models`.", autocompletion=complete_model)
    ],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fetch a model, and print its folder."""
    from kvzip.cli.loading import quiet_libraries
    from kvzip.models.fetch import ensure_model

    quiet_libraries()
    with Bars(quiet) as bars:
        folder = ensure_model(name, progress=bars)
    if as_json:
        print_json({"name": name, "path": str(folder)})
    else:
        print(folder)


def catalogue() -> list[CatalogueEntry]:
    from kvzip.models.catalogue import CATALOGUE

    return list(CATALOGUE.values())


def describe(entry: CatalogueEntry) -> dict[str, Any]:
    """One model of `--json`. The keys are a contract."""
    from kvzip.models.fetch import is_complete, model_folder

    folder = model_folder(entry.name)
    cached = is_complete(folder)
    return {
        "name": entry.name,
        "hub_id": entry.hub_id,
        "family": entry.family,
        "description": entry.description,
        "license": entry.license,
        "max_positions": entry.max_positions,
        "has_chat_template": entry.has_chat_template,
        "download_nbytes": entry.download_nbytes,
        "is_cached": cached,
        "path": str(folder) if cached else None,
    }


def show(rows: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for title in ("Name", "Family"):
        table.add_column(title, no_wrap=True)
    for title in ("Positions", "Download"):
        table.add_column(title, justify="right", no_wrap=True)
    for title in ("Licence", "Here"):
        table.add_column(title, no_wrap=True)
    for row in rows:
        here = "yes" if row["is_cached"] else "no"
        numbers = f"{row['max_positions']:,}", size(row["download_nbytes"])
        table.add_row(row["name"], row["family"], *numbers, row["license"], here)
    console = out()
    console.print(table)
    console.print("Fetched on first use, or by: kvzip models pull NAME", style="dim")
