"""Options and arguments that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeAlias

import typer


def complete_model(incomplete: str) -> list[tuple[str, str]]:
    """Names of the catalogue, for the shell."""
    from kvzip.models.catalogue import CATALOGUE

    return [(name, entry.description) for name, entry in CATALOGUE.items() if name.startswith(incomplete)]


def complete_method(incomplete: str) -> list[str]:
    """Names of methods, for the shell; spelled out here because the registry imports torch."""
    names = (
        "adakv", "baklava", "clusterkv", "duo-attention", "expected-attention", "h2o", "int4", "int8", "k8v4",
        "kvsharer", "kvzip", "kvzip+int4", "kvzip+k8v4", "kvzip+layer", "kvzip+uniform", "kvzip-fast", "kvzip-head",
        "kvzip-plus",        "l2-norm", "leankv", "pyramidkv", "random", "refreekv", "snapkv", "streaming-llm", "tova",
    )  # fmt: skip
    return [name for name in names if name.startswith(incomplete)]


MODEL_HELP = "A name of `kvzip models`, a hub id as org/name, a model folder, or a .gguf file."
Model: TypeAlias = Annotated[
    str,
    typer.Option(
        "-m", "--model", metavar="MODEL", envvar="KVZIP_MODEL", help=MODEL_HELP, autocompletion=complete_model
    ),
]
ModelOrNone: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "-m", "--model", metavar="MODEL", help="Another way to the model that the file names.",
        show_default=False, autocompletion=complete_model,
    ),
]  # fmt: skip
File: TypeAlias = Annotated[str, typer.Argument(metavar="FILE.kvz", help="A file made by `kvzip compress`.")]
DType: TypeAlias = Annotated[str, typer.Option("--dtype", metavar="DTYPE", help="auto, float32, float16 or bfloat16.")]
Device: TypeAlias = Annotated[str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:1, ...")]
Quiet: TypeAlias = Annotated[bool, typer.Option("-q", "--quiet", help="No progress and no notes on stderr.")]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")]
MaxNewTokens: TypeAlias = Annotated[
    int, typer.Option("-n", "--max-new-tokens", metavar="N", help="Longest answer, in tokens.")
]
Temperature: TypeAlias = Annotated[
    float, typer.Option("-t", "--temperature", metavar="T", min=0.0, help="0 takes the likeliest token, more samples.")
]
TopP: TypeAlias = Annotated[
    float,
    typer.Option("--top-p", metavar="P", min=0.0, max=1.0, help="Sample from the likeliest tokens that make up P."),
]
Seed: TypeAlias = Annotated[
    int | None, typer.Option("--seed", metavar="N", help="Makes sampling repeatable.", show_default=False)
]

Sampler: TypeAlias = Callable[[], dict[str, Any]]


def sampler(temperature: float, top_p: float, seed: int | None) -> Sampler:
    """Options of `generate`, made anew for each question: the seed starts over, so its order does not matter."""

    def options() -> dict[str, Any]:
        if temperature == 0:
            return {}
        if seed is not None:
            import torch

            torch.manual_seed(seed)
        return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}

    return options


def examples(*lines: str) -> str:
    """An epilog of commands, each on a line of its own."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)
