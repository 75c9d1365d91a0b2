"""`kvzip bench`: what compressing costs and what it brings, on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Annotated, Any

import typer

from kvzip.cli.border import Command, say
from kvzip.cli.options import Device, DType, Model, Quiet, examples
from kvzip.cli.screen import Bars, print_facts, print_json

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure what compressing costs and brings.")
EPILOG = examples(
    "kvzip bench compress -m smollm2-135m --context-len 2000",
    "kvzip bench open -m smollm2-135m --context-len 6000 --json open.json",
    "kvzip bench decode -m qwen2.5-coder-0.5b --context-len 16000",
)
MOST_BUSY = 0.25  # of the cores: where other programs take more, times say little

ContextLen = Annotated[int, typer.Option("--context-len", metavar="N", help="Tokens of the context.")]
KeepRatio = Annotated[float, typer.Option("-r", "--keep-ratio", metavar="R", help="Share of the KV pairs to keep.")]
Runs = Annotated[int, typer.Option("--runs", metavar="N", min=1, help="Counted runs, after one warm-up.")]
Text = Annotated[str | None, typer.Option("--text", metavar="FILE", help="A text, or SQuAD JSON. Default: bundled.")]
Threads = Annotated[int | None, typer.Option("--threads", metavar="N", min=1, help="Threads of torch.")]
Scope = Annotated[str, typer.Option("--replay-scope", metavar="SCOPE", help="global, local or auto.")]
JsonFile = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write the result there; - is stdout.")]


@app.command(cls=Command, epilog=EPILOG)
def compress(
    model: Model, context_len: ContextLen = 2000, keep_ratio: KeepRatio = 0.3, runs: Runs = 3, text: Text = None,
    replay_scope: Scope = "auto", threads: Threads = None, json_file: JsonFile = None, dtype: DType = "auto",
    device: Device = "auto", quiet: Quiet = False,
) -> None:  # fmt: skip
    """Compressing against a plain prefill: seconds, peak memory, bytes kept."""
    from kvzip.bench.compress import bench_compress

    _run(
        bench_compress,
        (context_len, keep_ratio, runs, text, replay_scope),
        model,
        dtype,
        device,
        threads,
        json_file,
        quiet,
    )


@app.command("open", cls=Command, epilog=EPILOG)
def open_(
    model: Model, context_len: ContextLen = 2000, keep_ratio: KeepRatio = 0.3, runs: Runs = 3, text: Text = None,
    threads: Threads = None, json_file: JsonFile = None, dtype: DType = "auto", device: Device = "auto",
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """The first token from a reopened file against reading the text again."""
    from kvzip.bench.open import bench_open

    _run(bench_open, (context_len, keep_ratio, runs, text), model, dtype, device, threads, json_file, quiet)


@app.command(cls=Command, epilog=EPILOG)
def decode(
    model: Model, context_len: ContextLen = 4000, keep_ratio: KeepRatio = 0.3, runs: Runs = 5,
    backend: Annotated[str, typer.Option(metavar="NAME", help="How ragged attention is computed.")] = "auto",
    threads: Threads = None, json_file: JsonFile = None, dtype: DType = "auto", device: Device = "auto",
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Decoding: attention, whole tokens and a batch, against transformers with its full cache. Random caches."""
    from kvzip.bench.decode import bench_decode

    settings = (context_len, keep_ratio, runs)
    _run(bench_decode, settings, model, dtype, device, threads, json_file, quiet, backend=backend)


@app.command(cls=Command, epilog=EPILOG)
def memory(
    model: Model, context_len: ContextLen = 2000, keep_ratio: KeepRatio = 0.3, runs: Runs = 3, text: Text = None,
    threads: Threads = None, json_file: JsonFile = None, dtype: DType = "auto", device: Device = "auto",
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Peak memory of reading and compressing, and what is held afterwards."""
    from kvzip.bench.memory import bench_memory

    _run(bench_memory, (context_len, keep_ratio, runs, text), model, dtype, device, threads, json_file, quiet)


@app.command(cls=Command, epilog=EPILOG)
def replay(
    model: Model,
    text: Annotated[str, typer.Option("--text", metavar="FILE.json", help="SQuAD JSON: the text and its questions.")],
    context_len: ContextLen = 2000, runs: Runs = 1,
    baseline: Annotated[bool, typer.Option(help="Measure a plain prefill and the scorer too.")] = True,
    threads: Threads = None, json_file: JsonFile = None, dtype: DType = "auto", device: Device = "auto",
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Global against local replay: time, overlap of the kept pairs, effect on answers at keep ratio 0.3 and 0.5."""
    from kvzip.bench.replay import bench_replay

    _run(bench_replay, (context_len, runs, text, baseline), model, dtype, device, threads, json_file, quiet)


@app.command(cls=Command, epilog=EPILOG)
def distill(
    model: Model,
    text: Annotated[
        str, typer.Option("--text", metavar="FILE.json", help="SQuAD JSON: text not learned from, and its questions.")
    ],
    context_len: ContextLen = 2000, runs: Runs = 3, threads: Threads = None, json_file: JsonFile = None,
    dtype: DType = "auto", device: Device = "auto", quiet: Quiet = False,
) -> None:  # fmt: skip
    """Foretold scores (kvzip-fast) against a replay: time, overlap, effect on answers. After `kvzip distill`."""
    from kvzip.bench.distill import bench_distill

    _run(bench_distill, (context_len, runs, text), model, dtype, device, threads, json_file, quiet)


@app.command(cls=Command, epilog=EPILOG)
def refit(
    model: Model, context_len: ContextLen = 2000, keep_ratio: KeepRatio = 0.4, runs: Runs = 3, text: Text = None,
    threads: Threads = None, json_file: JsonFile = None, dtype: DType = "auto", device: Device = "auto",
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Mending what stays (refit) against the replay whose queries it uses: seconds."""
    from kvzip.bench.refit import bench_refit

    _run(bench_refit, (context_len, keep_ratio, runs, text), model, dtype, device, threads, json_file, quiet)


@app.command(cls=Command, epilog=EPILOG)
def certificate(
    model: Model,
    text: Annotated[str, typer.Option("--text", metavar="FILE.json", help="SQuAD JSON: texts and their questions.")],
    context_len: ContextLen = 900,
    texts: Annotated[int, typer.Option("--texts", metavar="N", min=1, help="How many texts of that length.")] = 8,
    threads: Threads = None, json_file: JsonFile = None, dtype: DType = "auto", device: Device = "auto",
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """The measured loss of a context against the loss on real questions, over keep ratios and methods; its cost."""
    from kvzip.bench.certificate import bench_certificate

    _run(bench_certificate, (context_len, texts, text), model, dtype, device, threads, json_file, quiet)


@app.command(cls=Command, epilog=EPILOG)
def serve(
    model: Model, context_len: ContextLen = 2000, keep_ratio: KeepRatio = 0.3, runs: Runs = 3, text: Text = None,
    threads: Threads = None, json_file: JsonFile = None, dtype: DType = "auto", device: Device = "auto",
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Contexts on vLLM against plain prompts: memory, requests in flight, first tokens, decoding. Needs kvzip[vllm]."""
    from kvzip.bench.serve import bench_serve

    _run(bench_serve, (context_len, keep_ratio, runs, text), model, dtype, device, threads, json_file, quiet)


@app.command(cls=Command, epilog=EPILOG)
def served(
    model: Model,
    text: Annotated[str, typer.Option("--text", metavar="FILE.json", help="SQuAD JSON: texts and their questions.")],
    context_len: ContextLen = 900,
    texts: Annotated[int, typer.Option("--texts", metavar="N", min=1, help="How many texts of that length.")] = 4,
    threads: Threads = None, json_file: JsonFile = None, dtype: DType = "auto", device: Device = "auto",
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Answers through vLLM: contexts, portable contexts and the text itself. Needs kvzip[vllm]."""
    from kvzip.bench.served import bench_served

    _run(bench_served, (context_len, texts, text), model, dtype, device, threads, json_file, quiet)


@app.command(cls=Command, epilog=EPILOG)
def scale(
    context_len: Annotated[
        list[int] | None, typer.Option("--context-len", metavar="N", help="Tokens; give it again for more lengths.")
    ] = None,
    model: Annotated[str | None, typer.Option("-m", "--model", metavar="MODEL", help="A real model instead.")] = None,
    keep_ratio: KeepRatio = 0.3, replay_scope: Scope = "auto", threads: Threads = None, json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Time and memory against the length, with a tiny random-weight Llama: 20K to 170K tokens unless told."""
    from kvzip.cli.loading import load_llm, start

    with Bars(quiet) as bars:
        start(bars)
        busy = _look_around(quiet=quiet)
        _set_threads(threads)
        llm = None if model is None else load_llm(model, bars)
        from kvzip.bench.scale import bench_scale

        with bars.step("Measuring"):
            result = bench_scale(context_len or [20_000, 40_000, 80_000, 170_000], keep_ratio, replay_scope, llm)
    _show(result | {"busy_cores": busy}, json_file)


@app.command(cls=Command)
def report(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Where the result files are.")],
    output: Annotated[str, typer.Option("-o", "--output", metavar="FILE.md", help="The page to write.")],
    pictures: Annotated[bool, typer.Option("--pictures", help="Draw too: needs kvzip[plots].")] = False,
) -> None:
    """Write the page of results from the JSON files of a folder."""
    from pathlib import Path

    from kvzip.bench.report import load_results, results_page

    shown = {}
    if pictures:
        from kvzip.bench.plots import draw, draw_runs

        shown = draw(load_results(folder), Path(output).parent) | draw_runs(folder, Path(output).parent)
    Path(output).write_text(results_page(folder, shown), encoding="utf-8")


def _run(
    bench: Callable[..., dict[str, Any]], settings: tuple[Any, ...], model: str, dtype: str, device: str,
    threads: int | None, json_file: str | None, quiet: bool, backend: str = "auto",
) -> None:  # fmt: skip
    from kvzip.budget import check_keep_ratio
    from kvzip.cli.loading import load_llm, start

    for value in settings:
        if isinstance(value, float):  # keep ratios are the only ones
            check_keep_ratio(value)
    with Bars(quiet) as bars:
        start(bars)
        busy = _look_around(quiet=quiet)
        llm = load_llm(model, bars, dtype=dtype, device=device, backend=backend)
        _set_threads(threads)
        with bars.step("Measuring"):
            result = bench(llm, *settings) | {"busy_cores": busy}
    _show(result, json_file)


def _look_around(*, quiet: bool) -> float | None:
    """How many cores other programs keep busy, with a word where that spoils the times."""
    from kvzip.bench.measure import busy_cores

    busy, cores = busy_cores(), os.cpu_count() or 1
    if busy is not None and busy > MOST_BUSY * cores and not quiet:
        say(f"kvzip: other programs keep {busy:.1f} of {cores} cores busy: these times are not to be trusted")
    return busy


def _set_threads(threads: int | None) -> None:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def _show(result: dict[str, Any], json_file: str | None) -> None:
    """The result as JSON to a file or stdout, or as lines to read."""
    if json_file == "-":
        print_json(result)
        return
    if json_file is not None:
        from kvzip.bench.measure import write_result

        write_result(result, json_file)
    print_facts(_facts(result))


def _facts(result: dict[str, Any]) -> list[tuple[str, str]]:
    """One line a figure: median and extremes."""
    return [
        (name, f"{figure['median']:.4g}  [{figure['min']:.4g} - {figure['max']:.4g}], n = {figure['n']}")
        for name, figure in result["figures"].items()
    ]
