"""The command line as a process in a terminal: interrupts, pipes, full disks, progress, chats."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import TEXT, Running, environment, failed
from hypothesis import given
from hypothesis import strategies as st

from kvzip.cli import answers, border, screen

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
