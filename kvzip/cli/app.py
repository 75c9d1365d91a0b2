"""The commands, put together."""

from __future__ import annotations

from typing import Annotated

import typer

from kvzip._version import __version__
from kvzip.cli import (
    ask,
    bench,
    calibrate,
    chat,
    compress,
    demo,
    distill,
    eval,
    export,
    inspect,
    methods,
    models,
    serve,
)
from kvzip.cli.border import Command
from kvzip.cli.options import examples

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
EPILOG = examples(
    "kvzip demo                                     the two-minute tour",
    "kvzip compress book.txt -m qwen2.5-coder-0.5b  once: book.txt becomes book.kvz",
    'kvzip ask book.kvz "Who is the narrator?"      as often as you like, in any process',
)

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: short, quick, and the same in every terminal
    pretty_exceptions_enable=False,
    context_settings=SETTINGS,
    epilog=EPILOG,
)
app.command(cls=Command, epilog=demo.EPILOG)(demo.demo)
app.command(cls=Command, epilog=compress.EPILOG)(compress.compress)
app.command(cls=Command, epilog=ask.EPILOG)(ask.ask)
app.command(cls=Command, epilog=chat.EPILOG)(chat.chat)
app.command(cls=Command, epilog=inspect.EPILOG)(inspect.inspect)
app.command(cls=Command, epilog=export.EPILOG)(export.export)
app.command(cls=Command, epilog=serve.EPILOG)(serve.serve)
app.command(cls=Command, epilog=methods.EPILOG)(methods.methods)
app.add_typer(models.app, name="models")
app.add_typer(bench.app, name="bench")
app.command("eval", cls=Command, epilog=eval.EPILOG)(eval.eval_)
app.command(cls=Command, epilog=calibrate.EPILOG)(calibrate.calibrate)
app.command(cls=Command, epilog=distill.EPILOG)(distill.distill)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"kvzip {__version__}")
        raise typer.Exit


@app.callback()
def kvzip(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Compress the KV cache of a text once, ask it any number of questions."""
