"""`kvzip ask`: questions to a .kvz file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kvzip.cli.answers import answer_json, check_text, show_stream, timing
from kvzip.cli.options import (
    Device,
    DType,
    File,
    Json,
    MaxNewTokens,
    ModelOrNone,
    Quiet,
    Sampler,
    Seed,
    Temperature,
    TopP,
    examples,
    sampler,
)
from kvzip.cli.screen import Bars, note, out, print_json, wants_notes
from kvzip.cli.texts import STDIN, read_text

if TYPE_CHECKING:
    from kvzip.compressed import CompressedContext
    from kvzip.generation import Answer

EPILOG = examples(
    'kvzip ask book.kvz "Who is the narrator?"',
    'kvzip ask book.kvz "Who dies?" "Where does it end?" --json',
    "kvzip ask book.kvz --questions-file questions.txt --batch",
    'echo "Who is the narrator?" | kvzip ask book.kvz -',
)


def ask(
    file: File,
    questions: Annotated[
        list[str] | None,
        typer.Argument(metavar="QUESTION", help="Each is answered on its own; - reads one a line from stdin."),
    ] = None,
    questions_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="More questions, one a line.", show_default=False)
    ] = None,
    model: ModelOrNone = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    batch: Annotated[bool, typer.Option("--batch", help="Answer all questions at once; nothing is streamed.")] = False,
    dtype: DType = "auto",
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Ask a compressed text; nothing is remembered.

    Each question is answered by the text alone. The model is the one that the file names. Answers stream to stdout as
    they come.
    """
    asked = gather(questions or [], questions_file)
    with Bars(quiet) as bars:
        context = open_context(file, model, asked, max_new_tokens, bars, dtype=dtype, device=device)
    options = sampler(temperature, top_p, seed)
    if as_json:
        answers = answer_all(context, asked, max_new_tokens, options, batch=batch)
        print_json([answer_json(q, a) for q, a in zip(asked, answers, strict=True)])
    elif batch:
        show_batch(asked, answer_all(context, asked, max_new_tokens, options, batch=True))
    else:
        show_each(context, asked, max_new_tokens, options, notes=wants_notes(quiet))


def gather(questions: list[str], questions_file: str | None) -> list[str]:
    """All questions, in order. Raises InputError where there is none, or an empty one."""
    asked: list[str] = []
    for question in questions:
        asked += read_lines(STDIN) if question == STDIN else [question]
    asked += read_lines(questions_file) if questions_file else []
    if not asked:
        raise typer.BadParameter("give a question, - for stdin, or --questions-file")
    return asked


def read_lines(path: str) -> list[str]:
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def open_context(
    file: str, model: str | None, asked: list[str], max_new_tokens: int, bars: Bars, *, dtype: str, device: str
) -> CompressedContext:
    """The context of a file. What can be refused without the model is refused before it is loaded."""
    from kvzip.cli.loading import load_llm, model_of, start

    start(bars)
    from kvzip.generation import check_options

    check_options(max_new_tokens, {})
    for question in asked:
        check_text(question)
    name = model_of(file, model)
    return load_llm(name, bars, dtype=dtype, device=device).open(file)


def answer_all(
    context: CompressedContext, asked: list[str], max_new_tokens: int, options: Sampler, *, batch: bool
) -> list[Answer]:
    if batch:
        return context.ask_many(asked, max_new_tokens=max_new_tokens, **options())
    return [context.ask(question, max_new_tokens=max_new_tokens, **options()) for question in asked]


def show_each(
    context: CompressedContext, asked: list[str], max_new_tokens: int, options: Sampler, *, notes: bool
) -> None:
    """Stream the answers; with several questions, each question stands above its answer."""
    for index, question in enumerate(asked):
        show_question(question, index, len(asked))
        answer = show_stream(context.session().stream(question, max_new_tokens=max_new_tokens, **options()))
        if notes:
            note(timing(answer))


def show_batch(asked: list[str], answers: list[Answer]) -> None:
    from kvzip.inspect.summary import printable

    for index, (question, answer) in enumerate(zip(asked, answers, strict=True)):
        show_question(question, index, len(asked))
        print_text(printable(answer))


def show_question(question: str, index: int, count: int) -> None:
    from kvzip.inspect.summary import printable

    if count > 1:
        print_text("\n" * (index > 0) + printable(question), "bold")


def print_text(text: str, style: str = "") -> None:
    """A text on stdout; its lines are broken between words on a terminal, and nowhere in a file or pipe."""
    console = out()
    console.print(text, style=style, soft_wrap=not console.is_terminal)
