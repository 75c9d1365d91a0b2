"""`kvzip distill`: scores without a replay, learned once a model from texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kvzip.cli.options import Device, DType, Json, Model, Quiet, examples
from kvzip.cli.screen import Bars, plural, print_facts, print_json, seconds
from kvzip.cli.texts import read_text

if TYPE_CHECKING:
    from kvzip.distill import Distillation

EPILOG = examples(
    "kvzip distill -m qwen2.5-coder-0.5b --text one.txt --text another.txt",
    "kvzip compress book.txt -m qwen2.5-coder-0.5b --method kvzip-fast",
    "kvzip distill -m smollm2-135m    from a short bundled text",
)


def distill(
    model: Model,
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Text to learn from; give it again for more, best 10,000 tokens in all. Default: a short one.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Which fifth of the texts is held out.")] = 0,
    dtype: DType = "auto",
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Learn to foretell scores while a text is read, for --method kvzip-fast.

    Done once a model, in minutes; prints how well held-out text is foretold, and the file written."""
    from pathlib import Path

    from kvzip.cli.demo import BUNDLED, load_text
    from kvzip.cli.loading import load_llm

    contents = [read_text(path) for path in text] if text else [load_text()]
    source = ", ".join(Path(path).name for path in text) if text else BUNDLED
    with Bars(quiet) as bars:
        llm = load_llm(model, bars, dtype=dtype, device=device)
        found = llm.distill(contents, source, seed=seed, progress=bars)
    if as_json:
        print_json({"model": llm.name, "source": source, "seed": seed, **_json(found)})
    else:
        print_facts(_facts(found))


def _json(found: Distillation) -> dict[str, object]:
    return {
        "num_tokens": found.num_tokens,
        "num_held_out": found.num_held_out,
        "rank_correlation": found.held_out.rank_correlation,
        "overlap": {str(ratio): share for ratio, share in found.held_out.overlap.items()},
        "seconds": found.seconds,
        "path": str(found.path),
    }


def _facts(found: Distillation) -> list[tuple[str, str]]:
    overlaps = [
        (f"overlap at {ratio}", f"{share:.3f} of the kept pairs are the same")
        for ratio, share in found.held_out.overlap.items()
    ]
    return [
        ("learned from", f"{plural(found.num_tokens, 'token')}, in {seconds(found.seconds)}"),
        ("held out", f"{plural(found.num_held_out, 'token')}, foretold before they were learned from too"),
        ("rank correlation", f"{found.held_out.rank_correlation:.3f} with the scores of a replay"),
        *overlaps,
        ("written", str(found.path)),
    ]
