"""`kvzip calibrate`: what some methods have to know of a model, learned once from a text."""

from __future__ import annotations

from typing import Annotated

import typer

from kvzip.cli.options import Device, DType, Json, Model, Quiet, examples
from kvzip.cli.screen import Bars, print_json
from kvzip.cli.texts import read_text

EPILOG = examples(
    "kvzip calibrate --method baklava -m qwen2.5-coder-0.5b",
    "kvzip compress book.txt -m qwen2.5-coder-0.5b --method baklava",
    "kvzip calibrate --method kvsharer --num-layers 4 -m qwen2.5-coder-0.5b",
    "kvzip calibrate --method head -m qwen2.5-coder-0.5b --text book.txt",
)


def calibrate(
    model: Model,
    method: Annotated[
        str, typer.Option(metavar="KIND", help="head (for kvzip-head), baklava, duo (for duo-attention), or kvsharer.")
    ],
    text: Annotated[
        str | None, typer.Option(metavar="FILE", help="Text to read; by default, a bundled one.", show_default=False)
    ] = None,
    num_layers: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=0, help="kvsharer: layers to share, at most; by default an eighth.", show_default=False
        ),
    ] = None,
    dtype: DType = "auto",
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Learn of a model what a method needs.

    Done once a model; prints the file written."""
    from pathlib import Path

    from kvzip.cli.demo import BUNDLED, load_text
    from kvzip.cli.loading import check_can_fit, load_llm, start

    content = load_text() if text is None else read_text(text)
    source = BUNDLED if text is None else Path(text).name
    with Bars(quiet) as bars:
        start(bars)
        from kvzip.profilers import SHARING, get_profiler

        if method != SHARING:
            get_profiler(method)
        llm = load_llm(model, bars, dtype=dtype, device=device)
        if method != SHARING:  # which reads passages alone
            check_can_fit(llm, content)
        path = llm.calibrate(method, content, source, num_layers=num_layers, progress=bars)
    if as_json:
        print_json({"model": llm.name, "method": method, "path": str(path)})
    else:
        print(path)
