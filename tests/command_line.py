"""Ways to run the command line: in a fresh process, in a fork of one that has the libraries, in this one.

The model is tiny, with random weights, in a folder: its answers are noise, everything around them is real.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from tiny import SMALL
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import kvzip
from kvzip.cli import loading, main

ROOT = Path(kvzip.__file__).parents[1]
TEXT = "The lamp was lit in May.\nIt burned all night, and no ship was lost.\n" * 8
COMPRESS_KEYS = {
    "path", "model", "method", "context_len", "keep_ratio_asked", "keep_ratio", "kv_nbytes", "full_kv_nbytes",
    "prefill_s", "score_s", "total_s", "peak_rss_bytes", "loss",
}  # fmt: skip
ASK_KEYS = {"question", "answer", "num_new_tokens", "ttft_s", "tpot_s", "fetched_nbytes_per_step"}


# Importing torch and transformers takes seconds, so most commands run in a fork of a process that has them already;
# what a fork can't show (start-up, silence of the libraries) is tested in fresh processes.
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


def call(monkeypatch, capsys, cwd: Path, *args: str) -> tuple[int, str, str]:
    """Run a command in this process: exit code, stdout, stderr."""
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", ["kvzip", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        main()
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out, captured.err
