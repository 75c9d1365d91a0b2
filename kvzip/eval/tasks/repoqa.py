"""Find a function by its description and repeat it (RepoQA, arXiv 2406.06025; SCBench Code.RepoQA)."""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent

from kvzip.errors import InputError
from kvzip.eval.tasks.base import Question, Sample, Task, TaskSettings, spread

DEFAULT = (
    "statistics", "textwrap", "shlex", "heapq", "difflib", "calendar", "inspect", "ast", "pathlib", "argparse",
    "ipaddress", "collections", "email", "logging", "unittest", "asyncio", "mailbox", "tarfile", "zipfile", "http",
    "urllib", "xml", "_pydecimal", "ftplib", "imaplib", "pydoc", "doctest", "importlib", "multiprocessing", "turtle",
    "bdb", "pdb", "typing", "threading", "_pydatetime", "configparser", "shutil", "_pyio", "codecs", "optparse",
    "fractions", "random", "concurrent", "dis", "traceback", "smtplib", "socket", "tempfile", "pickletools", "wsgiref",
    "sqlite3", "datetime", "enum", "functools", "locale", "tokenize", "zoneinfo", "xmlrpc", "pickle", "subprocess",
    "symtable", "trace", "csv", "plistlib", "ssl", "uuid", "cmd", "code", "weakref", "pstats", "gettext", "ctypes",
)  # fmt: skip
MIN_LINES, MAX_LINES = 4, 25  # of a function
MIN_WORDS = 5  # of a description
NUM_QUESTIONS = 5
MAX_NEW_TOKENS = 320  # longer functions are not taken
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
        sizes = {function: settings.count_tokens(function[0] + GAP) for function in _functions(_sources(settings.path))}
        functions = {f: size for f, size in sizes.items() if size < MAX_NEW_TOKENS - 20}  # 20: the fences
        total = sum(functions.values())
        if len(functions) < MIN_FUNCTIONS or total < settings.context_len:
            raise InputError(
                f"{settings.path or 'the standard library'} has {len(functions)} documented functions of {MIN_LINES}-"
                f"{MAX_LINES} lines with {total} tokens, {MIN_FUNCTIONS} and {settings.context_len} are needed: give a "
                "larger package, or a smaller --context-len"
            )
        for index in range(settings.limit):
            rng = random.Random(f"{self.name}/{self.version}/{settings.seed}/{index}")
            yield self.make(rng, functions, settings)

    def make(self, rng: random.Random, functions: dict[Function, int], settings: TaskSettings) -> Sample:
        """A sample of functions drawn from `functions`, which says how many tokens each has."""
        chosen = self.draw(rng, functions, settings.context_len)
        return Sample(GAP.join(code for code, _ in chosen), tuple(self.ask(rng, chosen)))

    def draw(self, rng: random.Random, functions: dict[Function, int], length: int) -> list[Function]:
        """Functions that fill `length` tokens. Raises InputError where fewer than two do."""
        chosen: list[Function] = []
        left = length
        for function in rng.sample(list(functions), len(functions)):
            if functions[function] <= left:
                chosen.append(function)
                left -= functions[function]
            if left < max(30, 0.02 * length):
                break
        if len(chosen) < 2:
            raise InputError(
                f"task {self.name!r}: fewer than two functions fit the context: give a larger --context-len"
            )
        return chosen

    def ask(self, rng: random.Random, chosen: list[Function]) -> Iterator[Question]:
        """Questions about functions at all depths."""
        for place in spread(rng, len(chosen), min(self.num_asked, len(chosen))):
            code, description = chosen[place]
            others = [other for other, _ in chosen if other != code]
            yield Question(
                f"Which function of the code above is described here?\n{description}\n"
                "Repeat that function exactly as it stands there, in a code block.",
                (code, *others),
            )


def _sources(name: str | None) -> list[Path]:
    """Python files of a package, folder or file, in a fixed order. Raises InputError."""
    found = _files(Path(name)) if name and Path(name).exists() else []
    found = found or [path for part in ([name] if name else DEFAULT) for path in _installed(part)]
    if not found:
        raise InputError(f"{name!r} is no installed package and no Python source: give one, as --data repoqa=email")
    return found


def _installed(name: str) -> list[Path]:
    """Files of an installed package; a part of one, as email.utils, stands for all of it."""
    try:
        spec = find_spec(name.partition(".")[0])
    except (ImportError, ValueError):
        return []
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return []
    path = Path(spec.origin)
    return _files(path.parent if path.name == "__init__.py" else path)


def _files(path: Path) -> list[Path]:
    """Python files of a folder, without its tests, or the file itself."""
    if not path.is_dir():
        return [path] * (path.suffix == ".py")
    return sorted(p for p in path.rglob("*.py") if not {"test", "tests"} & set(p.relative_to(path).parts))


def _functions(paths: list[Path]) -> Iterator[Function]:
    """(code without docstring, description) of documented functions and methods, each name and description once."""
    seen: set[str] = set()
    for path in paths:
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        lines = source.split("\n")
        for node in (n for top in tree.body for n in (top.body if isinstance(top, ast.ClassDef) else [top])):
            if not isinstance(node, ast.FunctionDef) or node.name in seen:
                continue
            about = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            if about and about not in seen and (function := _function(node, about, lines)):
                seen |= {node.name, about}
                yield function


def _function(node: ast.FunctionDef, about: str, lines: list[str]) -> Function | None:
    """None for what is too short, too long, or not described in words.  about: its docstring's first paragraph."""
    if ">>>" in about or len(node.body) < 2:
        return None
    docstring = node.body[0]
    kept = [*lines[node.lineno - 1 : docstring.lineno - 1], *lines[docstring.end_lineno or 0 : node.end_lineno]]
    description = re.sub(rf"\b{re.escape(node.name)}\b(\([^)]*\))?", "it", about)
    if not MIN_LINES <= len(kept) <= MAX_LINES or len(description.split()) < MIN_WORDS:
        return None
    code = dedent("\n".join(line.rstrip() for line in kept))
    return (code, description) if code.startswith("def ") else None  # a string in it may stand at the margin
