"""The command line at its border: help, start, reading texts, what bad input gets."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import TEXT, call, environment, failed, run
from hypothesis import given
from hypothesis import strategies as st

import kvzip
from kvzip.cli import loading, texts
from kvzip.errors import ContextLengthError, FileError, InputError
from kvzip.loading import load

# ---- help, version, start


def test_help_is_quick_and_light(tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run("--help", cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
    assert done.returncode == 0
    assert used < 0.4, f"{used:.2f} s of processor time"
    for name in ("demo", "compress", "ask", "chat", "inspect", "methods", "models", "serve", "calibrate", "distill"):
        assert re.search(rf"^  {name} .*\.$", done.stdout, re.MULTILINE), name  # with its whole line of help


@pytest.mark.parametrize(
    "args", [["--help"], ["compress", "--help"], ["ask", "--help"], ["models", "--json"], ["models"]]
)
def test_light_commands_import_nothing_heavy(args, tmp_path):
    code = (
        "import sys\nfrom kvzip.cli import main\n"
        f"sys.argv = ['kvzip', *{args!r}]\n"
        "try: main()\nexcept SystemExit as end: assert not end.code, end.code\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), check=True, capture_output=True)


def test_version(tmp_path):
    assert run("--version", cwd=tmp_path).stdout == f"kvzip {kvzip.__version__}\n"


@pytest.mark.parametrize(
    "name", ["demo", "compress", "ask", "chat", "inspect", "methods", "models", "serve", "calibrate", "distill"]
)
def test_every_command_shows_examples(name, tmp_path):
    done = run(name, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "Examples:\n    kvzip " in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 96


def test_wrong_usage_exits_2(tmp_path):
    for args in (["nothing"], ["compress"], ["ask", "x.kvz", "--bad"], ["ask", "x.kvz"], ["models", "nothing"]):
        done = run(*args, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, ""), args
        assert "Error: " in done.stderr and "Traceback" not in done.stderr


def test_shell_completion(tmp_path):
    done = run("--show-completion", "bash", cwd=tmp_path, env={"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"})
    assert "_KVZIP_COMPLETE" in done.stdout
    env = {"_KVZIP_COMPLETE": "complete_bash", "COMP_WORDS": "kvzip models pull smol", "COMP_CWORD": "3"}
    assert "smollm2-135m" in run(cwd=tmp_path, env=env).stdout


# ---- reading texts


@given(st.text(alphabet=st.characters(exclude_characters="\0\ufeff", exclude_categories=["Cs"])))
def test_any_utf8_text_is_read_as_it_is(text):
    if text.strip():
        assert texts.decode_text(text.encode(), "x") == text
        assert texts.decode_text(b"\xef\xbb\xbf" + text.encode(), "x") == text
    else:
        with pytest.raises(InputError, match="at least one word"):
            texts.decode_text(text.encode(), "x")


@given(st.binary(max_size=200))
def test_any_bytes_are_text_or_one_line_of_error(data):
    try:
        text, message = texts.decode_text(data, "'x.txt'"), ""
    except InputError as error:
        text, message = "", str(error)
    if message:
        assert len(message.splitlines()) == 1 and "'x.txt'" in message
    else:
        assert text.strip() and "\0" not in text
        assert text.encode() in (data, data[3:])


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        (b"", ["is empty"]),
        (b" \n\t\n", ["nothing but space"]),
        (b"abc\0def", ["binary", "offset 3"]),
        (b"caf\xe9", ["not UTF-8", "0xe9", "offset 3", "iconv"]),
        ("text".encode("utf-16"), ["UTF-16", "iconv -f UTF-16"]),
        ("text".encode("utf-32"), ["UTF-32", "iconv -f UTF-32"]),
    ],
)
def test_unreadable_texts_are_refused_in_one_line(data, parts, tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        texts.read_text(str(path))
    assert all(part in str(caught.value) for part in [*parts, "x.txt"])


def test_paths_that_hold_no_text(tmp_path):
    with pytest.raises(FileError, match="No such file"):
        texts.read_text(str(tmp_path / "none.txt"))
    with pytest.raises(FileError, match="is a folder"):
        texts.read_text(str(tmp_path))
    with pytest.raises(FileError, match="can't read"):
        texts.read_text("a\0b")
    (tmp_path / "large").write_bytes(b"x" * 101)
    with pytest.raises(FileError, match="101 bytes, at most 100"):
        texts.read_text(str(tmp_path / "large"), max_nbytes=100)
    with pytest.raises(FileError, match="more than 100 bytes"):
        texts.read_text("/dev/zero", max_nbytes=100)  # has no size beforehand


def test_a_text_that_can_not_fit_is_refused_without_tokenizing(tiny):
    llm = load(tiny)
    loading.check_can_fit(llm, "x" * 1000)
    llm.tokenize = None  # type: ignore[assignment]
    with pytest.raises(ContextLengthError, match="16,384 positions"):
        loading.check_can_fit(llm, "x" * 1_000_000)


# ---- what bad input gets


def test_compress_refuses_before_it_loads_a_model(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "notes.md").write_text("precious")
    on = lambda *args: run("compress", *args, "-m", "no/model", cwd=tmp_path)  # noqa: E731
    failed(on("none.txt"), "'none.txt'", "No such file")
    failed(on("text.txt", "-o", "no/where.kvz"), "'no'", "does not exist")
    failed(on("text.txt", "-o", "/proc/x.kvz"), "'/proc'", "can't write")
    failed(on("text.txt", "-o", "."), "is a folder")
    failed(on("text.txt", "-o", "text.txt"), "overwrite the text itself")
    failed(on("text.txt", "-o", "notes.md"), "'notes.md'", "--force")
    assert (tmp_path / "notes.md").read_text() == "precious"


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--keep-ratio", "1.5"], ["1.5", "0 < r <= 1"]),
        (["--keep-ratio", "0"], ["0.0", "0 < r <= 1"]),
        (["--keep-ratio", "nan"], ["nan", "0 < r <= 1"]),
        (["--budget", "many"], ["'many'", "64MiB"]),
        (["--budget", "-3"], ["-3", "64MiB"]),
        (["--method", "kvzp"], ["'kvzp'", "did you mean 'kvzip'"]),
        (["--chunk-len", "0"], ["chunk_len 0", "at least 1"]),
        (["--dtype", "int3"], ["'int3'", "float32"]),
        (["--device", "abacus"], ["'abacus'", "cpu"]),
        (["-m", "smollm2"], ["unknown model 'smollm2'", "did you mean 'smollm2-135m'"]),
    ],
)
def test_options_out_of_range(args, parts, tiny, monkeypatch, capsys, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    code, out, err = call(monkeypatch, capsys, tmp_path, "compress", "text.txt", "-m", tiny, *args)
    assert (code, out) == (1, "")
    assert err.startswith("kvzip: error: ") and err.count("\n") == 1
    assert all(part in err for part in parts), err
    assert os.listdir(tmp_path) == ["text.txt"]


def test_keep_ratio_and_budget_together_are_wrong_usage(tiny, monkeypatch, capsys, tmp_path):
    code, _, err = call(monkeypatch, capsys, tmp_path, "compress", "x", "-m", tiny, "-r", "0.3", "--budget", "10")
    assert code == 2 and "not both" in err


def test_ask_refuses(tiny_kvz, tmp_path, monkeypatch, capsys):
    def refused(*args: str) -> str:
        code, out, err = call(monkeypatch, capsys, tmp_path, "ask", *args)
        assert (code, out) == (1, "")
        assert err.startswith("kvzip: error: ") and err.count("\n") == 1
        return err

    (tmp_path / "bad.kvz").write_bytes(b"not ours" * 100)
    (tmp_path / "cut.kvz").write_bytes(tiny_kvz.read_bytes()[:-50])
    flipped = bytearray(tiny_kvz.read_bytes())
    flipped[-20] ^= 1
    (tmp_path / "flipped.kvz").write_bytes(flipped)
    (tmp_path / "empty.txt").write_text("\n")
    assert "No such file" in refused("none.kvz", "Who?")
    for name in ("bad.kvz", "cut.kvz", "flipped.kvz"):
        assert name in refused(name, "Who?")
    assert "question is empty" in refused(str(tiny_kvz), " ")
    assert "not valid UTF-8" in refused(str(tiny_kvz), "\udcff")
    assert "max_new_tokens 0" in refused(str(tiny_kvz), "Who?", "--max-new-tokens", "0")
    assert "16384 positions" in refused(str(tiny_kvz), "Who?", "-n", "20000")
    assert "empty.txt" in refused(str(tiny_kvz), "--questions-file", "empty.txt")
    assert "made with" in refused(str(tiny_kvz), "Who?", "-m", other_model(tmp_path, tiny_kvz))


def other_model(folder: Path, tiny_kvz: Path) -> str:
    """A model that differs from the one of the file in one weight matrix."""
    from kvzip.store import read_info

    llm = load(read_info(tiny_kvz).info.model)
    llm.model.lm_head.weight.data += 1
    llm.model.save_pretrained(folder / "other")
    llm.tokenizer.save_pretrained(folder / "other")
    return str(folder / "other")
