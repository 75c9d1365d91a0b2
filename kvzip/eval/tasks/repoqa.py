"""Find a function by its description and repeat it (RepoQA, arXiv 2406.06025; SCBench Code.RepoQA)."""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from kvzip.errors import InputError
from kvzip.eval.code_similarity import same_function
from kvzip.eval.tasks.base import Question, Sample, Task, TaskSettings, spread

DEFAULT = (
    "statistics", "textwrap", "shlex", "heapq", "difflib", "calendar", "inspect", "ast", "pathlib", "argparse",
    "ipaddress", "collections", "email", "logging", "unittest", "asyncio",
)  # fmt: skip
MIN_LINES, MAX_LINES = 4, 25  # of a function
MIN_WORDS = 5  # of a description
NUM_QUESTIONS = 5
MAX_NEW_TOKENS = 320
MIN_FUNCTIONS = 20
GAP = "\n\n\n"
Function = tuple[str, str]  # code without its docstring, description


class RepoQA(Task):
    """Functions of a package without their docstrings; what a docstring says is asked for as code.

    The descriptions are the authors' docstrings, not written by a model as in the paper.
    path: name of an installed package, or a folder or file of Python source; modules of the standard library where
    none is given. Nothing is imported.
    """

    name = "repoqa"
    source = "RepoQA, arXiv 2406.06025, and SCBench Code.RepoQA, arXiv 2412.10319; descriptions are docstrings"
    licence = "that of the package: the standard library of Python is PSF-2.0"
    metric = "same_function"
    num_questions = str(NUM_QUESTIONS)
    reads = "the name of an installed package, or a folder or file of Python source"
    instruction = "Below are functions of a program."
    max_new_tokens = MAX_NEW_TOKENS
    num_asked = NUM_QUESTIONS

    def samples(self, settings: TaskSettings) -> Iterator[Sample]:
        functions = list(_functions(_sources(settings.path)))
        total = sum(settings.count_tokens(code) for code, _ in functions)
        if len(functions) < MIN_FUNCTIONS or total < settings.context_len:
            raise InputError(
                f"{settings.path or 'the standard library'} has {len(functions)} documented functions of {MIN_LINES}-"
                f"{MAX_LINES} lines with {total} tokens, {MIN_FUNCTIONS} and {settings.context_len} are needed: give a "
                "larger package, or a smaller --context-len"
            )
        for index in range(settings.limit):
            rng = random.Random(f"{self.name}/{self.version}/{settings.seed}/{index}")
            yield self.make(rng, functions, settings)

    def make(self, rng: random.Random, functions: list[Function], settings: TaskSettings) -> Sample:
        """A sample of (code, description) pairs drawn from `functions`."""
        chosen = self.draw(rng, functions, settings, lambda code: code)
        return Sample(GAP.join(code for code, _ in chosen), tuple(self.ask(rng, chosen)))

    def draw(
        self, rng: random.Random, functions: list[Function], settings: TaskSettings, block: Callable[[str], str]
    ) -> list[Function]:
        """As many of the functions as fit the length, at least one for each question.  block: what stands for one."""
        chosen: list[Function] = []
        length = 0
        for function in rng.sample(functions, len(functions)):
            length += settings.count_tokens(block(function[0]) + GAP)
            if length > settings.context_len and len(chosen) >= self.num_asked:
                break
            chosen.append(function)
        return chosen

    def ask(self, rng: random.Random, chosen: list[Function]) -> Iterator[Question]:
        """Questions about functions at all depths."""
        for place in spread(rng, len(chosen), self.num_asked):
            code, description = chosen[place]
            others = [other for other, _ in chosen if other != code]
            yield Question(
                f"Which function of the code above is described here?\n{description}\n"
                "Repeat that function exactly as it stands there, in a code block.",
                (code, *others),
            )

    def score(self, prediction: str, question: Question) -> float:
        return same_function(prediction, question.golds)


def _sources(name: str | None) -> list[Path]:
    """Python files of a package, folder or file, in a fixed order. Raises InputError."""
    found = [path for part in ([name] if name else DEFAULT) for path in _files(part)]
    if not found:
        raise InputError(f"{name!r} is no installed package and no Python source: give one, as --data repoqa=email")
    return found


def _files(name: str) -> list[Path]:
    path = Path(name)
    if not path.exists():
        try:
            spec = find_spec(name.partition(".")[0])
        except (ImportError, ValueError):
            return []
        if spec is None or not spec.origin or not spec.origin.endswith(".py"):
            return []
        path = Path(spec.origin)
        path = path.parent if path.name == "__init__.py" else path
    return sorted(path.rglob("*.py")) if path.is_dir() else [path] * (path.suffix == ".py")


def _functions(paths: list[Path]) -> Iterator[Function]:
    """(code without docstring, description) of documented functions, each name once."""
    seen: set[str] = set()
    for path in paths:
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (OSError, ValueError, SyntaxError):
            continue
        lines = source.split("\n")
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name not in seen and (found := _function(node, lines)):
                seen.add(node.name)
                yield found


def _function(node: ast.FunctionDef, lines: list[str]) -> Function | None:
    """None for what is too short, too long, or not described."""
    about = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
    if not about or len(node.body) < 2:
        return None
    docstring = node.body[0]
    kept = [*lines[node.lineno - 1 : docstring.lineno - 1], *lines[docstring.end_lineno or 0 : node.end_lineno]]
    description = re.sub(rf"\b{re.escape(node.name)}\b(\([^)]*\))?", "it", about)
    if not MIN_LINES <= len(kept) <= MAX_LINES or len(description.split()) < MIN_WORDS:
        return None
    return "\n".join(line.rstrip() for line in kept), description
