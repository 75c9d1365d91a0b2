"""What the pages say is so: links, commands, options, code, the version; and the README's example runs."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

import kvzip
from kvzip.cli.app import app

ROOT = Path(kvzip.__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TREATY = (
    "The Treaty of Harrow was signed on 4 May 1871 at Harrow Castle. Queen Ingrid signed for Norland and Count Otto "
    "Weiss signed for Estmark. Both sides met in the great hall. The treaty ended a war of three years. "
) * 3


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in one of these languages."""
    return [code for language, code in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def slugs(page: Path) -> set[str]:
    """The anchors of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in slugs(file)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_are_python(page: Path) -> None:
    for number, code in enumerate(blocks(page, "python", "py")):
        compile(code, f"{page.name}, block {number}", "exec")


def shown_commands(page: Path) -> Iterator[list[str]]:
    """The arguments of each `kvzip` that a shell block runs."""
    for block in blocks(page, "sh", "bash", "console"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in shlex_split_pipes(line.removeprefix("$ ")):
                words = part[1:] if part[:1] == ["kvzip"] else None
                if words is not None:
                    yield words


def shlex_split_pipes(line: str) -> list[list[str]]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|;&<>")
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("|;&"):
            commands.append([])
        else:
            commands[-1].append(word)
    return commands


def resolve(words: list[str]) -> tuple[Any, list[str]]:
    """The command that these words name, and the words that remain for it."""
    command: Any = typer.main.get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    return command, words


def options_of(command: Any) -> set[str]:
    own = [name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)]
    return {*own, "--help", "-h"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_shown_commands_can_be_parsed(page: Path) -> None:
    for words in shown_commands(page):
        command, rest = resolve(words)
        assert not hasattr(command, "commands") or not rest or rest[0].startswith("-"), f"no command {words}"
        if rest or not hasattr(command, "commands"):
            command.make_context(" ".join(words), list(rest))  # raises what the user would get as wrong usage


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_in_the_prose_exist(page: Path) -> None:
    for code in re.findall(r"`kvzip ([^`]+)`", prose(page)):
        command, rest = resolve(code.split())
        assert rest != code.split() or rest[0].startswith("-"), f"there is no command `kvzip {code}`"
        wrong = {word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)} - options_of(command)
        assert not wrong, f"`kvzip {code}`: no option {wrong}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_shown_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    text = "\n".join([*blocks(page, "sh"), *re.findall(r"`(make [^`]+)`", prose(page))])
    for line in re.findall(r"^make (.*)$", text, re.MULTILINE):
        named = [word for word in shlex.split(line, comments=True) if "=" not in word]
        assert set(named) <= targets, line


def test_every_command_is_in_the_readme() -> None:
    command: Any = typer.main.get_command(app)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [name for name in command.commands if f"kvzip {name}" not in text and name != "bench"]
    assert not missing


def test_the_changelog_has_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## [{kvzip.__version__}] - " in text


def test_ci_runs_the_commands_of_the_readme() -> None:
    commands = [line.split() for line in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()]
    targets = next(line[1:] for line in commands if line[:1] == ["make"])
    assert "test" in targets and "check" in targets
    assert re.search(r"^make test\b", "\n".join(blocks(ROOT / "README.md", "sh")), re.MULTILINE)


def test_no_file_has_a_path_of_somebodys_machine() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    pattern = re.compile(rb"/(home|root|work)/")
    files = [ROOT / name for name in names if name]
    found = [str(file.relative_to(ROOT)) for file in files if file.is_file() and pattern.search(file.read_bytes())]
    assert not found


@pytest.mark.real
def test_the_example_of_the_readme_runs(
    smollm: kvzip.LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "treaty.txt").write_text(4 * TREATY, encoding="utf-8")  # a short text has no measured loss
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kvzip, "load", lambda name: smollm, raising=False)
    run = smollm.generator.run
    brief = lambda cache, ids, mask, longest, *rest: run(cache, ids, mask, min(longest, 12), *rest)  # noqa: E731
    monkeypatch.setattr(smollm.generator, "run", brief)
    known: dict[str, Any] = {}
    for code in blocks(ROOT / "README.md", "python"):
        exec(code, known)
    assert {"treaty.kvz", "chat.kvz"} <= {path.name for path in tmp_path.iterdir()}
    assert str(known["answer"]).strip() and len(known["both"]) == 2
    assert len(known["chat"].turns) == 1
    assert known["output"].shape[1] > known["ids"].shape[1]
    assert known["context"].stats["kv_nbytes"] < known["context"].stats["full_kv_nbytes"] / 2
    assert "bytes instead of" in capsys.readouterr().out
    assert smollm.open_session("chat.kvz").turns == known["chat"].turns
