"""The .kvz file under damage and failures: cut, flipped, mutated; a full disk, a kill, two writers."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from random_context import Shape, random_context
from stored import (
    FULL_SHAPE,
    Stored,
    assert_refused,
    forge,
    leftovers,
    parts_of,
    raw,
    same,
)

from kvzip import store
from kvzip.context import ContextInfo
from kvzip.errors import FileError, FormatError

# ---- damage


def read_or_refuse(path: Path, content: bytes, original: Stored) -> None:
    path.write_bytes(content)
    for verify in (True, False):
        try:
            found = store.read(path, verify=verify)
        except FormatError as error:
            message = str(error)
        else:
            message = "" if not verify or same(found, original) else "a wrong answer\n"
        assert "\n" not in message


def test_truncated_anywhere(either: tuple[Path, Stored]) -> None:
    path, _ = either
    content = path.read_bytes()
    lengths = [*range(0, len(content), 23), *range(len(content) - 40, len(content)), *range(40)]
    for length in lengths:
        path.write_bytes(content[:length])
        assert_refused(path, verify=bool(length % 2))
    path.write_bytes(content + b"\0")
    assert_refused(path)


def test_flipped_bits_anywhere(either: tuple[Path, Stored]) -> None:
    path, original = either
    content, rng = path.read_bytes(), random.Random(0)
    header_len = int.from_bytes(content[:8], "little")
    for round_ in range(500):
        damaged = bytearray(content)
        for _ in range(rng.choice([1, 1, 2, 8])):
            end = 8 if round_ % 10 == 0 else 8 + header_len if round_ % 2 else len(content)
            damaged[rng.randrange(end)] ^= 1 << rng.randrange(8)
        read_or_refuse(path, bytes(damaged), original)


JUNK: list[Any] = [
    None,
    True,
    0,
    -1,
    1,
    3,
    7,
    1 << 31,
    1 << 63,
    1 << 64,
    1.5,
    "",
    "F32",
    "I32",
    "BF16",
    "F4",
    "C64",
    [],
    {},
    [0, 8],
]


def mutate(value: Any, rng: random.Random) -> Any:
    """A copy of a JSON value with one thing changed somewhere in it."""
    if isinstance(value, dict) and value and rng.random() < 0.95:
        key = rng.choice(list(value))
        changed = {k: v for k, v in value.items() if k != key}
        if (what := rng.random()) < 0.15:
            return changed
        name = rng.choice([*value, f"{key}x", "layers.1.bias", "ranks"]) if what < 0.3 else key
        return changed | {name: mutate(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = rng.randrange(len(value))
        return [*value[:i], mutate(value[i], rng), *value[i + 1 :]]
    if isinstance(value, int) and rng.random() < 0.6:
        return value + rng.choice([-4, -1, 1, 4, 8])
    if isinstance(value, str) and value[:1] in ("{", "[") and rng.random() < 0.7:
        return json.dumps(mutate(json.loads(value), rng))
    return rng.choice(JUNK)


def test_mutated_headers(either: tuple[Path, Stored]) -> None:
    path, original = either
    content, rng = path.read_bytes(), random.Random(0)
    start = 8 + int.from_bytes(content[:8], "little")
    entries = json.loads(content[8:start])
    for _ in range(600):
        read_or_refuse(path, raw(mutate(entries, rng), content[start:]), original)


def test_mutated_metadata_with_a_right_sha256(either: tuple[Path, Stored]) -> None:
    path, _ = either
    metadata, tensors = parts_of(path)
    rng = random.Random(0)
    for _ in range(200):
        key = rng.choice(list(metadata))
        forge(path, metadata | {key: str(mutate(metadata[key], rng))}, tensors)
        with suppress(FormatError):
            assert isinstance(store.read(path)[0].info, ContextInfo)


# ---- failures while writing


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError, OSError(28, "No space left on device")])
@pytest.mark.parametrize("place", ["os.fsync", "os.replace", "kvzip.store.files.bytes_of"])
def test_a_failure_leaves_the_old_file(
    stored: tuple[Path, Stored], monkeypatch: pytest.MonkeyPatch, place: str, failure: Any
) -> None:
    path, original = stored
    before, calls = path.read_bytes(), iter(range(1000))
    real = store.files.bytes_of

    def fail(*args: Any) -> Any:
        if place.endswith("bytes_of") and next(calls) < 25:  # the first calls hash, the later ones write
            return real(*args)
        raise failure

    monkeypatch.setattr(place, fail)
    wanted = FileError if isinstance(failure, OSError) else failure
    with pytest.raises(wanted) as caught:
        store.write(path, *random_context(FULL_SHAPE, seed=1))
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert same(store.read(path), original)
    assert not leftovers(path.parent)
    if isinstance(failure, OSError):
        assert "No space left" in str(caught.value)
        assert "free some space" in str(caught.value)


def test_folders_that_take_no_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    context, _ = random_context(Shape())
    for path in ("missing/doc.kvz", "file/doc.kvz", "folder", "pipe", "x" * 300, "a\0b"):
        with pytest.raises(FileError) as caught:
            store.write(tmp_path / path, context)
        assert "\n" not in str(caught.value)
        assert "check the path" in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder", "pipe"]
    assert not list((tmp_path / "folder").iterdir())


def child(code: str, *args: object) -> subprocess.Popen[str]:
    """A Python process that runs `code` with `args` as sys.argv[1:]."""
    preamble = "import os, sys, time\nfrom kvzip import store\nfrom kvzip.errors import FileError\nfrom random_context import *\n"
    folders = [str(Path(__file__).parent), str(Path(store.__file__).parents[2])]
    return subprocess.Popen(
        [sys.executable, "-c", preamble + code, *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"},
    )


FULL_THEN_SLOW = """
import resource, signal
context, tail = random_context(Shape(head_dim=64, context_len=2000, tail_len=6), seed=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a write beyond the limit gives EFBIG
try:
    store.write(sys.argv[1], context)
except FileError as error:
    print(error, flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
real, calls = store.files.bytes_of, 0
def slow(tensor):
    global calls
    calls += 1
    if calls == 25:  # past the hashing, in the middle of the data
        print("writing", flush=True)
        time.sleep(60)
    return real(tensor)
store.files.bytes_of = slow
store.write(sys.argv[1], context, tail)
"""


def test_a_disk_that_takes_no_more_and_a_kill(stored: tuple[Path, Stored]) -> None:
    path, original = stored
    process = child(FULL_THEN_SLOW, path)
    assert process.stdout is not None
    message = process.stdout.readline()
    assert "File too large" in message
    assert "use another disk" in message
    assert process.stdout.readline() == "writing\n"
    assert same(store.read(path), original)
    assert len(leftovers(path.parent)) == 1  # of the second write; the first removed its own
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert len(leftovers(path.parent)) == 1  # nobody is left to remove it
    assert same(store.read(path), original)
    store.write(path, *original)
    assert same(store.read(path), original)


WRITERS_SHAPE = Shape(head_dim=32, context_len=1000, tail_len=6)
WRITER = """
context, tail = random_context(Shape(head_dim=32, context_len=1000, tail_len=6), seed=int(sys.argv[2]))
print("ready", flush=True)
sys.stdin.readline()
deadline = time.monotonic() + 1
while time.monotonic() < deadline:
    store.write(sys.argv[1], context, tail)
"""


def test_replaced_while_opening(stored: tuple[Path, Stored], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors opens a path once to read the header and once more to map it."""
    path, original = stored
    store.write(tmp_path / "new.kvz", *random_context(FULL_SHAPE, seed=1))
    real = torch.UntypedStorage.from_file

    def replace_then_map(*args: Any, **kwargs: Any) -> Any:
        with suppress(FileNotFoundError):
            (tmp_path / "new.kvz").replace(path)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", replace_then_map)
    assert same(store.read(path), original)
    assert not (tmp_path / "new.kvz").exists()


def test_two_processes_write_and_one_reads(tmp_path: Path) -> None:
    path = tmp_path / "doc.kvz"
    mine, theirs = (random_context(WRITERS_SHAPE, seed) for seed in (1, 2))
    store.write(path, *mine)
    other = child(WRITER, path, 2)
    assert other.stdin is not None
    assert other.stdout is not None
    assert other.stdout.readline() == "ready\n"
    other.stdin.write("go\n")
    other.stdin.flush()
    seen = set()
    with ThreadPoolExecutor(1) as pool:
        while other.poll() is None:
            writing = pool.submit(store.write, path, *mine)
            for verify in (True, False):
                found = store.read(path, verify=verify)
                assert same(found, mine) or same(found, theirs)
                seen.add(same(found, mine))
            store.read_info(path)
            writing.result()
    other.communicate()
    assert other.returncode == 0
    assert seen == {True, False}
    assert not leftovers(tmp_path)
