"""The command line: as a user runs it, in processes of its own where the behaviour of a process is the point.

Most tests use a tiny model with random weights in a folder: its answers are noise, everything around them is real.
"""

from __future__ import annotations

import json
import os
import pty
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import SMALL
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import kvzip
from kvzip.cli import answers, border, demo, loading, main, screen, texts
from kvzip.errors import ContextLengthError, FileError, InputError
from kvzip.loading import load

ROOT = Path(kvzip.__file__).parents[1]
TEXT = "The lamp was lit in May.\nIt burned all night, and no ship was lost.\n" * 8
COMPRESS_KEYS = {
    "path", "model", "method", "context_len", "keep_ratio_asked", "keep_ratio", "kv_nbytes", "full_kv_nbytes",
    "prefill_s", "score_s", "total_s", "peak_rss_bytes",
}  # fmt: skip
ASK_KEYS = {"question", "answer", "num_new_tokens", "ttft_s", "tpot_s", "fetched_nbytes_per_step"}


# Importing torch and transformers takes seconds, so most commands run in a fork of a process that has them already;
# what a fork can't show (start-up, silence of the libraries) is tested in fresh processes, `fresh=True`.
FORKS = """
import fcntl, json, os, resource, signal, socket, sys, termios
import kvzip.loading, kvzip.inspect.html, kvzip.inspect.terminal, rich.progress
from transformers.models.llama import modeling_llama
server = socket.socket(fileno=int(sys.argv[1]))
server.send(b"ready")
while True:
    data, fds, *_ = socket.recv_fds(server, 1 << 20, 3)
    if not data:
        break
    job = json.loads(data)
    pid = os.fork()
    if pid == 0:
        server.close()
        os.setsid()
        for target, fd in enumerate(fds):
            os.dup2(fd, target)
            os.close(fd)
        sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)
        sys.stderr = open(2, "w", buffering=1, closefd=False)
        if os.isatty(0):
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        if job["fsize"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["fsize"],) * 2)
        os.chdir(job["cwd"])
        os.environ.update(job["env"])
        sys.argv = ["kvzip", *job["args"]]
        exec(job["before"])
        from kvzip.cli import main
        main()
    for fd in fds:
        os.close(fd)
    server.send(b"%d" % pid)
    server.send(b"%d" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def environment(**more: str) -> dict[str, str]:
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "80", "NO_COLOR": "1", "TERM": "xterm"}
    return {**os.environ, **own, **more}


class Forks:
    """Runs commands one at a time, each in a fork of one process."""

    def __init__(self) -> None:
        self.is_running = False
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        call = [sys.executable, "-c", FORKS, str(theirs.fileno())]
        self.process = subprocess.Popen(call, env=environment(**loading.QUIET), pass_fds=[theirs.fileno()])
        theirs.close()
        assert self.socket.recv(16) == b"ready"

    def start(self, args, cwd: Path, fds: tuple[int, int, int], *, env=(), fsize: int = 0, before: str = "") -> int:
        """The id of the process. `wait` must follow."""
        if self.is_running:  # a test that failed did not wait
            self.wait()
        self.is_running = True
        job = {"args": list(map(str, args)), "cwd": str(cwd), "env": dict(env), "fsize": fsize, "before": before}
        socket.send_fds(self.socket, [json.dumps(job).encode()], fds)
        return int(self.socket.recv(16))

    def wait(self) -> int:
        """The exit code of the process started last."""
        self.is_running = False
        return int(self.socket.recv(16))

    def close(self) -> None:
        self.socket.close()
        self.process.wait(timeout=10)


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    made = Forks()
    yield made
    made.close()


class Running:
    """A command that runs in a fork, with pipes."""

    def __init__(self, forks: Forks, args, cwd: Path, **options) -> None:
        pipes = [os.pipe(), os.pipe(), os.pipe()]
        theirs = (pipes[0][0], pipes[1][1], pipes[2][1])
        self.forks, self.pid = forks, forks.start(args, cwd, theirs, **options)
        for fd in theirs:
            os.close(fd)
        self.stdin = os.fdopen(pipes[0][1], "wb", buffering=0)
        self.stdout, self.stderr = os.fdopen(pipes[1][0], "rb", buffering=0), os.fdopen(pipes[2][0], "rb")

    def interrupt(self) -> None:
        os.kill(self.pid, signal.SIGINT)

    def finish(self, stdin: bytes = b"") -> subprocess.CompletedProcess:
        with suppress(BrokenPipeError):
            self.stdin.write(stdin)
        self.stdin.close()
        out, err = (b"" if f.closed else f.read() for f in (self.stdout, self.stderr))  # both are short
        self.stdout.close()
        self.stderr.close()
        return subprocess.CompletedProcess([], self.forks.wait(), out.decode(errors="replace"), err.decode())


def run(*args: str, cwd: Path, stdin: str = "", env=()) -> subprocess.CompletedProcess:
    """Run a command in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-m", "kvzip", *map(str, args)],
        cwd=cwd, input=stdin.encode(), capture_output=True, env=environment(**dict(env)), timeout=120,
    )  # fmt: skip
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    return done


def failed(done: subprocess.CompletedProcess, *parts: str) -> None:
    """It failed with one line that holds these parts, and printed nothing."""
    assert done.returncode == 1, (done.returncode, done.stderr)
    assert done.stdout == ""
    assert done.stderr.startswith("kvzip: error: ") and done.stderr.count("\n") == 1, done.stderr
    for part in parts:
        assert part in done.stderr


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """The folder of a tiny model: one token a byte, 16K positions, never an end token."""
    folder = tmp_path_factory.mktemp("tiny-model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>").save_pretrained(
        folder
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL | {"max_position_embeddings": 16384}))
    model.lm_head.weight.data[:3] = 0  # special tokens are never the likeliest
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tiny_kvz(tiny, tmp_path_factory) -> Path:
    """A compressed text of the tiny model, made by the command line."""
    folder = tmp_path_factory.mktemp("tiny-kvz")
    (folder / "text.txt").write_text(TEXT)
    done = run("compress", "text.txt", "-m", tiny, "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert json.loads(done.stdout).keys() >= COMPRESS_KEYS
    return folder / "text.kvz"


# ---- help, version, start


def test_help_is_quick_and_light(tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run("--help", cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
    assert done.returncode == 0
    assert used < 0.4, f"{used:.2f} s of processor time"
    for name in ("demo", "compress", "ask", "chat", "inspect", "methods", "models", "calibrate", "distill"):
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
    "name", ["demo", "compress", "ask", "chat", "inspect", "methods", "models", "calibrate", "distill"]
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


def call(monkeypatch, capsys, cwd: Path, *args: str) -> tuple[int, str, str]:
    """Run a command in this process: exit code, stdout, stderr."""
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", ["kvzip", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        main()
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out, captured.err


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


# ---- the commands, on a tiny model


def test_compress_prints_a_summary(tiny, monkeypatch, capsys, tmp_path):
    (tmp_path / "my text.txt").write_text(TEXT)
    code, out, err = call(monkeypatch, capsys, tmp_path, "compress", "my text.txt", "-m", tiny, "--budget", "900")
    assert (code, err) == (0, "")
    assert re.search(r"^Context +544 tokens", out, re.MULTILINE)
    assert "kvzip ask 'my text.kvz'" in out
    assert not any(line != line.rstrip() for line in out.splitlines())
    assert (tmp_path / "my text.kvz").exists()


def test_compress_reads_stdin_and_replaces_its_own_file(forks, tiny, tmp_path):
    for budget in ("8KiB", "16KiB"):
        running = Running(forks, ["compress", "-", "-m", tiny, "--budget", budget, "--json"], tmp_path)
        done = running.finish(TEXT.encode())
        found = json.loads(done.stdout)
        assert done.stderr == ""
        assert found["path"] == "stdin.kvz"
        assert found["kv_nbytes"] <= int(budget[:-3]) * 1024
    assert os.listdir(tmp_path) == ["stdin.kvz"]


def test_ask_streams_answers_and_prints_json(tiny_kvz, monkeypatch, capsys, tmp_path):
    ask = lambda *args: call(monkeypatch, capsys, tmp_path, "ask", tiny_kvz, *args, "-n", "8")  # noqa: E731
    code, one, err = ask("Who?")
    assert (code, err) == (0, "")
    code, two, _ = ask("Who?", "When?")
    assert two.startswith(f"Who?\n{one}\nWhen?\n")
    code, out, err = ask("Who?", "When?", "--json")
    found = json.loads(out)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert [row["question"] for row in found] == ["Who?", "When?"]
    assert all(row.keys() >= ASK_KEYS and row["num_new_tokens"] == 8 for row in found)
    batched = json.loads(ask("Who?", "When?", "--json", "--batch")[1])
    assert [row["answer"] for row in batched] == [row["answer"] for row in found]
    assert ask("Who?", "When?", "--batch")[1].startswith("Who?\n")


def test_questions_from_stdin_and_from_a_file(forks, tiny_kvz, tmp_path):
    (tmp_path / "more.txt").write_text("Where?\n")
    args = ["ask", tiny_kvz, "-", "--questions-file", "more.txt", "-n", "4", "--json"]
    done = Running(forks, args, tmp_path).finish(b"Who?\n\nWhen?")
    assert [row["question"] for row in json.loads(done.stdout)] == ["Who?", "When?", "Where?"]


def test_a_seed_makes_sampling_repeatable(tiny_kvz, monkeypatch, capsys, tmp_path):
    def sample(*args: str) -> list[str]:
        options = ["-n", "12", "-t", "1.5", "--top-p", "0.99", "--json", *args]
        return [row["answer"] for row in json.loads(call(monkeypatch, capsys, tmp_path, "ask", tiny_kvz, *options)[1])]

    first = sample("Who?", "Who?", "--seed", "1")
    assert first[0] == first[1] == sample("Who?", "--seed", "1")[0]
    assert sample("Who?", "--seed", "2")[0] != first[0]


def test_chat_serves_lines(forks, tiny_kvz, tmp_path):
    def chat(file, stdin: str) -> subprocess.CompletedProcess:
        return Running(forks, ["chat", file, "-n", "6"], tmp_path).finish(stdin.encode())

    lines = [
        "Who?",
        "/stats",
        "When?",
        "/rewind",
        "/save talk.kvz",
        "/nonsense",
        "/help",
        "/reset",
        "/rewind 5",
        "/quit",
        "no",
    ]
    done = chat(tiny_kvz, "\n".join(lines))
    assert done.returncode == 1  # two of the lines were refused
    assert done.stdout.count("turn remembered") == 1 and "0 turns remembered" in done.stdout
    assert "/rewind [N]" in done.stdout
    errors = done.stderr.splitlines()
    assert len(errors) == 2 and "'/nonsense'" in errors[0] and "can't rewind 5 turns" in errors[1]
    again = chat("talk.kvz", "/stats\nWhen?\n/stats")
    assert (again.returncode, again.stderr) == (0, "")
    assert re.findall(r"Conversation +(\d) turn", again.stdout) == ["1", "2"]
    straight = chat(tiny_kvz, "Who?\nWhen?").stdout
    assert straight.splitlines()[-1] == again.stdout.splitlines()[-4]


def test_inspect_needs_no_model(tiny_kvz, tmp_path, monkeypatch, capsys):
    inspect = lambda *args: call(monkeypatch, capsys, tmp_path, "inspect", *args)  # noqa: E731
    found = json.loads(inspect(tiny_kvz, "--json")[1])
    assert len(found["pairs_per_head"]) == 3 and found["context_len"] == 544
    assert "lamp" in inspect(tiny_kvz)[1]
    assert "lamp" not in inspect(tiny_kvz, "--no-text")[1]
    code, out, err = inspect(tiny_kvz, "-m", "no/model")
    assert code == 0 and "What was kept" in out and "lamp" not in out
    assert err.count("\n") == 1 and "tokenizer of 'no/model' is not on this machine" in err


def test_inspect_writes_a_page(tiny_kvz, tmp_path, monkeypatch, capsys):
    code, out, err = call(monkeypatch, capsys, tmp_path, "inspect", tiny_kvz, "--html", "page.html")
    assert (code, out, err) == (0, "wrote page.html\n", "")
    assert "<html" in (tmp_path / "page.html").read_text()
    code, _, err = call(monkeypatch, capsys, tmp_path, "inspect", tiny_kvz, "--html", "no/page.html")
    assert code == 1 and "does not exist" in err


def test_models_lists_and_pulls(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KVZIP_CACHE", str(tmp_path / "cache"))
    rows = json.loads(call(monkeypatch, capsys, tmp_path, "models", "--json")[1])
    assert {row["name"] for row in rows} >= {"smollm2-135m"} and not any(row["is_cached"] for row in rows)
    assert "smollm2-135m" in call(monkeypatch, capsys, tmp_path, "models")[1]
    code, _, err = call(monkeypatch, capsys, tmp_path, "models", "pull", "smolm2")
    assert code == 1 and "did you mean 'smollm2-135m'" in err


def test_methods_are_listed_with_needs_and_options(tmp_path, monkeypatch, capsys):
    rows = json.loads(call(monkeypatch, capsys, tmp_path, "methods", "--json")[1])
    found = {(row["kind"], row["name"]): row for row in rows}
    assert len(found) == len(rows) and {row["kind"] for row in rows} == {
        "method",
        "scorer",
        "budget",
        "transform",
        "fetch",
    }
    pyramid = found["method", "pyramidkv"]
    assert pyramid["composition"] == "window:window_size=8+pyramid" and pyramid["needs"] == ["window_queries"]
    assert pyramid["options"]["window_size"]["default"] == "8" and pyramid["options"]["beta"]["default"] == "20"
    assert found["method", "kvzip"]["query_agnostic"] and not found["method", "snapkv"]["query_agnostic"]
    assert all(row["description"] and row["source"] for row in rows)
    decide = {(row["kind"], row["name"]) for row in rows if row["decides_count"]}
    assert decide == {("method", "refreekv"), ("method", "leankv"), ("budget", "threshold")}
    code, shown, _ = call(monkeypatch, capsys, tmp_path, "methods")
    assert code == 0 and all(row["name"] in shown for row in rows)


def test_a_method_that_decides_how_much_to_keep_takes_no_ratio(tiny, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    args = ["compress", "text.txt", "-m", tiny, "--method", "refreekv:whole_layers=0,threshold=0.2"]
    code, out, _ = call(monkeypatch, capsys, tmp_path, *args, "--json")
    made = json.loads(out)
    assert code == 0 and made["keep_ratio_asked"] is None and 0 < made["keep_ratio"] < 1
    assert "asked" not in call(monkeypatch, capsys, tmp_path, *args)[1]
    code, _, err = call(monkeypatch, capsys, tmp_path, *args, "-r", "0.3")
    assert code == 1 and err.count("\n") == 1 and "decides itself how much to keep: leave it out" in err


@pytest.mark.parametrize(
    ("kind", "method"),
    [("head", "kvzip-head"), ("baklava", "baklava"), ("duo", "duo-attention"), ("kvsharer", "kvzip+kvsharer")],
)
def test_calibrate_serves_the_methods_that_need_it(tiny, tmp_path, monkeypatch, capsys, kind, method):
    monkeypatch.setenv("KVZIP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(TEXT)
    compress = ["compress", "text.txt", "-m", tiny, "--method", method, "-r", "0.5"]
    code, _, err = call(monkeypatch, capsys, tmp_path, *compress)
    assert code == 1 and f"kvzip calibrate --method {kind}" in err
    args = ["calibrate", "--method", kind, "-m", tiny, "--text", "text.txt"]
    code, out, err = call(monkeypatch, capsys, tmp_path, *args)
    assert (code, err) == (0, "") and Path(out.strip()).is_file()
    made = json.loads(call(monkeypatch, capsys, tmp_path, *args, "--json")[1])
    assert made["method"] == kind and made["path"] == out.strip() and made["model"]
    assert call(monkeypatch, capsys, tmp_path, *compress)[0] == 0


def test_distill_serves_kvzip_fast(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KVZIP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "other.txt").write_text(TEXT[::-1])
    compress = ["compress", "text.txt", "-m", tiny, "--method", "kvzip-fast", "-r", "0.5"]
    code, _, err = call(monkeypatch, capsys, tmp_path, *compress)
    assert code == 1 and "kvzip distill -m MODEL" in err and err.count("\n") == 1
    args = ["distill", "-m", tiny, "--text", "text.txt", "--text", "other.txt", "--seed", "1"]
    made = json.loads(call(monkeypatch, capsys, tmp_path, *args, "--json")[1])
    assert made["source"] == "text.txt, other.txt" and made["seed"] == 1 and Path(made["path"]).is_file()
    assert 0 < made["num_held_out"] < made["num_tokens"] and set(made["overlap"]) == {"0.5", "0.3"}
    code, out, err = call(monkeypatch, capsys, tmp_path, *args)
    assert (code, err) == (0, "") and made["path"] in out
    assert f"{made['rank_correlation']:.3f} with the scores of a replay" in out and "overlap at 0.3" in out
    assert call(monkeypatch, capsys, tmp_path, *compress)[0] == 0


def test_what_can_not_be_distilled_is_refused(tiny, tmp_path, monkeypatch, capsys):
    (tmp_path / "short.txt").write_text("Short.")
    for name, reason in (("short.txt", "give at least 200"), ("missing.txt", "missing.txt")):
        code, out, err = call(monkeypatch, capsys, tmp_path, "distill", "-m", tiny, "--text", name)
        assert code == 1 and not out and reason in err and err.count("\n") == 1


def test_what_can_not_be_calibrated_is_refused(tiny, tmp_path, monkeypatch, capsys):
    (tmp_path / "short.txt").write_text("Short.")
    code, _, err = call(monkeypatch, capsys, tmp_path, "calibrate", "--method", "baklawa", "-m", tiny)
    assert code == 1 and "did you mean 'baklava'" in err
    args = ["calibrate", "--method", "duo", "-m", tiny, "--text", "short.txt"]
    code, _, err = call(monkeypatch, capsys, tmp_path, *args)
    assert code == 1 and "give more than 320" in err and err.count("\n") == 1


# ---- the demo


def test_the_questions_of_the_demo_can_be_answered_from_the_text():
    text, quizzes = " ".join(demo.load_text().split()), demo.load_quizzes()
    assert 1300 <= len(text.split()) <= 1800
    assert len(quizzes) >= 6
    assert all(any(phrase.lower() in text.lower() for phrase in quiz.expect) for quiz in quizzes)
    lines = (Path(kvzip.__file__).parent / "data" / "lighthouse.questions.txt").read_text().splitlines()
    assert lines == [quiz.question for quiz in quizzes]


def test_the_demo_runs(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "load_text", lambda: TEXT)
    code, out, err = call(monkeypatch, capsys, tmp_path, "demo", "-m", tiny)
    assert (code, err) == (0, "")
    assert "reopened in" in out and f"of {len(demo.load_quizzes())} right" in out
    assert os.listdir(tmp_path) == []


# ---- processes


SIGNAL_AT = """
import signal
from kvzip.cli import screen
plain = screen.Bars.__call__
def call(self, phase, done, total):
    plain(self, phase, done, total)
    if phase == {phase!r} and done:
        os.kill(os.getpid(), signal.SIGINT)
screen.Bars.__call__ = call
"""


@pytest.mark.parametrize("phase", ["prefill", "score"])
def test_ctrl_c_while_compressing(phase, forks, tiny, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    done = Running(forks, ["compress", "text.txt", "-m", tiny], tmp_path, before=SIGNAL_AT.format(phase=phase)).finish()
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "kvzip: interrupted\n")
    assert os.listdir(tmp_path) == ["text.txt"]


@pytest.mark.parametrize("delay_s", [0.6, 2.0])
def test_ctrl_c_while_starting(delay_s, tiny_kvz, tmp_path):
    with subprocess.Popen(
        [sys.executable, "-m", "kvzip", "ask", tiny_kvz, "Who?", "-n", "9000"],
        cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        time.sleep(delay_s)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "kvzip: interrupted\n")


def test_ctrl_c_while_answering(forks, tiny_kvz, tmp_path):
    running = Running(forks, ["ask", tiny_kvz, "Who?", "-n", "9000"], tmp_path)
    running.stdout.read(1)
    running.interrupt()
    done = running.finish()
    assert (done.returncode, done.stderr) == (130, "kvzip: interrupted\n")


def test_ctrl_c_in_a_chat_stops_the_answer_only(forks, tiny_kvz, tmp_path):
    running = Running(forks, ["chat", tiny_kvz, "-n", "9000"], tmp_path)
    running.stdin.write(b"Who?\n")
    running.stdout.read(1)
    running.interrupt()
    done = running.finish(b"/stats\n/save talk.kvz\n")
    assert done.returncode == 0, done.stderr
    assert "stopped" in done.stderr
    assert "1 turn," in done.stdout and "saved talk.kvz" in done.stdout


def test_a_reader_that_leaves_is_no_error(forks, tiny_kvz, tmp_path):
    running = Running(forks, ["ask", tiny_kvz, "Who?", "-n", "2000"], tmp_path)
    running.stdout.read(1)
    running.stdout.close()
    done = running.finish()
    assert (done.returncode, done.stderr) == (1, "")


def test_a_full_disk_leaves_the_old_file(forks, tiny, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    small = Running(forks, ["compress", "text.txt", "-m", tiny, "--budget", "10"], tmp_path).finish()
    assert small.returncode == 0, small.stderr
    old = (tmp_path / "text.kvz").read_bytes()
    failed(
        Running(forks, ["compress", "text.txt", "-m", tiny], tmp_path, fsize=len(old)).finish(),
        "text.kvz",
        "free some space",
    )
    assert (tmp_path / "text.kvz").read_bytes() == old
    assert sorted(os.listdir(tmp_path)) == ["text.kvz", "text.txt"]


@pytest.mark.parametrize("args", [["models"], ["--help"], ["models", "--json"]])
def test_a_full_stdout_is_one_line(args, tmp_path):
    with open("/dev/full", "wb") as full:
        call = [sys.executable, "-m", "kvzip", *args]
        done = subprocess.run(call, cwd=tmp_path, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("kvzip: error: ") and done.stderr.count("\n") == 1


def test_bugs_are_one_line_unless_debugging(monkeypatch, capsys):
    def crash() -> None:
        with border.border():
            raise RuntimeError("first\nsecond\x1b[31m")

    with pytest.raises(border.typer.Exit) as end:
        crash()
    assert end.value.exit_code == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "RuntimeError: first second" in err and "KVZIP_DEBUG=1" in err and "\x1b" not in err
    monkeypatch.setenv("KVZIP_DEBUG", "1")
    with pytest.raises(border.typer.Exit):
        crash()
    assert "Traceback" in capsys.readouterr().err


# ---- terminals


def in_terminal(forks, args, cwd: Path, keys: list[tuple[str, bytes]] = []) -> tuple[int, str]:  # noqa: B006
    """Run in a pseudo terminal; each of `keys` is typed once its text was seen, one after the other.

    Exit code and everything shown. (Wait for the prompt: what is typed before it may be lost.)
    """
    terminal, theirs = pty.openpty()
    pid = forks.start(args, cwd, (theirs, theirs, theirs))
    os.close(theirs)
    shown, start, waiting, deadline = b"", 0, list(keys), time.monotonic() + 60
    while time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                shown += os.read(terminal, 4096)
            except OSError:
                break
        while waiting and (at := shown.find(waiting[0][0].encode(), start)) >= 0:
            start = at + len(waiting[0][0])
            os.write(terminal, waiting.pop(0)[1])
    else:
        os.kill(pid, signal.SIGKILL)
    code = forks.wait()
    os.close(terminal)
    return code, shown.decode(errors="replace")


def test_progress_shows_in_a_terminal_only(forks, tiny, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT * 4)
    code, shown = in_terminal(forks, ["compress", "text.txt", "-m", tiny], tmp_path)
    assert code == 0, shown
    assert "Reading" in shown and "Scoring" in shown and "tokens" in shown
    code, shown = in_terminal(forks, ["compress", "text.txt", "-m", tiny, "--quiet"], tmp_path)
    assert code == 0 and "Reading" not in shown and "Kept" in shown


def test_a_chat_in_a_terminal(forks, tiny_kvz, tmp_path):
    keys = [("> ", b"Who?\r"), ("a second", b""), ("> ", b"/save talk.kvz\r"), ("saved", b"")]
    keys += [("> ", b"\x03"), ("leaves", b""), ("> ", b"\x04")]
    code, shown = in_terminal(forks, ["chat", tiny_kvz, "-n", "5"], tmp_path, keys)
    assert code == 0, shown
    assert "544 tokens" in shown and "5 tokens, the first after" in shown
    code, shown = in_terminal(forks, ["chat", "talk.kvz"], tmp_path, [("> Who?", b""), ("> ", b"/quit\r")])
    assert code == 0, shown


def test_units():
    assert (screen.size(0), screen.size(5 << 20), screen.size(3 << 30)) == ("0 B", "5.0 MiB", "3.00 GiB")
    assert (screen.seconds(0.0852), screen.seconds(1.236), screen.seconds(12.34)) == ("85 ms", "1.24 s", "12.3 s")
    assert screen.amount(1024, 2013, "tokens") == "1,024/2,013 tokens"
    assert screen.rate(1000, 2.0, "tokens") == "500 tokens/s" and screen.rate(1000, 0.0, "tokens") == ""
    assert (screen.left(1, 4, 60.0), screen.left(1, 4, 10.0)) == ("3 min left", "30 s left")
    assert screen.left(0, 4, 10.0) == screen.left(4, 4, 10.0) == ""
    assert screen.amount(3, None, "bytes") == ""


@given(st.text(alphabet="ab \n", max_size=60), st.integers(0, 60))
def test_answers_are_wrapped_between_words(text, cut):
    wrap = answers.WordWrap(8)
    shown = wrap(text[:cut]) + wrap(text[cut:])
    assert "".join(shown.split()) == "".join(text.split())
    longest = max(map(len, text.split()), default=0)
    assert max(map(len, shown.split("\n"))) <= max(8, longest, len(text) - len(text.lstrip(" ")) + longest)


# ---- a real model


@pytest.mark.real
def test_from_a_text_to_an_answer(forks, tmp_path):
    (tmp_path / "light.txt").write_text("\n\n".join(demo.load_text().split("\n\n")[3:6]))
    done = run("compress", "light.txt", "-m", "smollm2-135m", "-r", "0.6", "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert done.stderr == "" and found.keys() >= COMPRESS_KEYS
    assert found["keep_ratio"] == pytest.approx(0.6, abs=1e-4)
    assert found["kv_nbytes"] < 0.65 * found["full_kv_nbytes"]
    done = Running(forks, ["ask", "light.kvz", "Who was born at Saffron Walden?", "-n", "16"], tmp_path).finish()
    assert done.stderr == "" and "Winstanley" in done.stdout
    done = Running(forks, ["inspect", "light.kvz"], tmp_path).finish()
    assert done.stderr == "" and "Winstanley" in done.stdout


@pytest.mark.real
def test_the_full_cache_answers_every_question_of_the_demo():
    """Else the comparison of the demo would mean nothing."""
    full, quizzes = load("qwen2.5-coder-0.5b").prefill(demo.load_text()).compress(1.0), demo.load_quizzes()
    answers = full.ask_many([quiz.question for quiz in quizzes], max_new_tokens=demo.MAX_NEW_TOKENS)
    assert not [answer for quiz, answer in zip(quizzes, answers, strict=True) if not quiz.is_right(answer)]


# ---- eval


def test_eval_measures_writes_a_page_and_goes_on(tiny, tmp_path, monkeypatch, capsys):
    args = (
        "eval", "-m", tiny, "--tasks", "niah", "--methods", "kvzip", "--keep-ratios", "0.5", "--limit", "2",
        "--context-len", "200", "--json", "rows.jsonl", "--report", "page.html", "--pictures", "png",
    )  # fmt: skip
    code, out, err = call(monkeypatch, capsys, tmp_path, *args)
    assert (code, err) == (0, "")
    methods = ("full", "kvzip", "random", "streaming-llm")
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [["niah", m] for m in methods]
    assert "<h2>niah</h2>" in (tmp_path / "page.html").read_text()
    assert sorted(p.name for p in (tmp_path / "png").iterdir()) == [
        "niah-curves.png", "niah-kept.png", "niah-needles.png",
    ]  # fmt: skip
    rows = (tmp_path / "rows.jsonl").read_bytes()
    assert str(tmp_path).encode() not in rows
    assert call(monkeypatch, capsys, tmp_path, *args)[:2] == (0, out)
    assert (tmp_path / "rows.jsonl").read_bytes() == rows
    code, out, err = call(monkeypatch, capsys, tmp_path, *args, "--seed", "3")
    assert (code, out) == (1, "") and "holds a run of other settings" in err and err.count("\n") == 1
    code, out, err = call(monkeypatch, capsys, tmp_path, "eval", "--compare", "rows.jsonl", "rows.jsonl")
    assert (code, err) == (0, "") and out.count("+0.0 ± 0.0") == len(methods)


def test_eval_takes_a_text_and_questions(tiny, tmp_path, monkeypatch, capsys):
    (tmp_path / "t.txt").write_text("The quick brown fox jumps over the lazy dog. " * 9)
    (tmp_path / "q.txt").write_text("Who jumps?\tfox\n\nOver whom?\n")
    args = ("eval", "-m", tiny, "--tasks", "text", "--data", "t.txt", "--keep-ratios", "1,0.2", "--json", "r.jsonl")
    code, _, err = call(
        monkeypatch, capsys, tmp_path, *args, "--questions", "q.txt", "--reconstruction", "--multi-turn"
    )
    assert (code, err) == (0, "")
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    (asked,) = [row for row in rows if row["kind"] == "asked"]
    assert [q["text"] for q in asked["questions"]] == ["Who jumps?", "Over whom?"]
    full, *others = [row for row in rows if row["kind"] == "row"]
    assert asked["questions"][0]["gold"] == "fox" and asked["questions"][1]["gold"] == full["answers"][1]["answer"]
    assert all(0 <= row["reconstruction"] <= 1 for row in others) and len(others) == 6
    code, out, err = call(monkeypatch, capsys, tmp_path, *args[:-2])
    assert (code, out) == (1, "") and "the text has 0 sentences with a rare name" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "code", "reason"),
    [
        (["--tasks", "nia"], 1, "did you mean 'niah'"),
        (["--methods", "kvzi"], 1, "did you mean 'kvzip'"),
        (["--keep-ratios", "0.5,x"], 2, "keep ratio 'x' is not a number"),
        (["--keep-ratios", "1.2"], 1, "1.2 is out of range"),
        (["--limit", "0"], 2, "limit"),
        (["--json", "none/rows.jsonl"], 1, "'none' does not exist"),
        (["--report", "none/page.html"], 1, "'none' does not exist"),
        (["--tasks", "squad", "--data", "none.json"], 1, "none.json can't be read"),
        (["--tasks", "squad,gsm8k", "--data", "x"], 2, "2 of the tasks read a file"),
        (["--tasks", "retr-kv", "--data", "x"], 2, "0 of the tasks read a file"),
        (["--compare", "none.jsonl", "x"], 1, "none.jsonl is not a result file"),
    ],
)
def test_eval_refuses_bad_input(tiny, tmp_path, monkeypatch, capsys, args, code, reason):
    found = call(monkeypatch, capsys, tmp_path, "eval", "-m", tiny, "--context-len", "200", *args)
    assert found[0] == code and reason in found[2].replace("\n", " ")
    assert not list(tmp_path.iterdir())


def test_eval_lists_its_tasks(tmp_path, monkeypatch, capsys):
    code, out, err = call(monkeypatch, capsys, tmp_path, "eval", "--list")
    assert (code, err) == (0, "") and all(name in out for name in ("retr-kv", "squad", "gsm8k"))
    code, out, err = call(monkeypatch, capsys, tmp_path, "eval")
    assert code == 2 and "--model" in err
