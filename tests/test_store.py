"""The .kvz file: what is written comes back bit for bit, and nothing else ever does."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_context import INFO, Shape, random_context
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvzip import store
from kvzip.context import ContextInfo, RaggedContext, RaggedLayer, SavedTail
from kvzip.errors import FileError, FormatError, InputError, ModelMismatchError
from kvzip.ops.quantize import Layout
from kvzip.ops.ragged import pack_bits

FIXTURE = Path(__file__).parent / "data" / "v1.kvz"
FULL_SHAPE = Shape(
    windows=(None, 5, None),
    has_bias=True,
    tail_len=6,
    num_pending=1,
    turns=(("Wer?", "Ärzte \U0001f600\n"), ("\ud83d lone", "")),
)
LEVELS_SHAPE = replace(
    FULL_SHAPE,
    head_dim=8,
    levels=((Layout(8, "token", 4), Layout(4, "channel", 5)), (Layout(2, "channel", 3), Layout(2, "token", 8))),
)
Stored = tuple[RaggedContext, "SavedTail | None"]
Parts = tuple[dict[str, str], dict[str, Tensor]]


# ---- helpers


def named(context: RaggedContext, tail: SavedTail | None) -> dict[str, Tensor | None]:
    """Every tensor of a context and its tail under a name."""
    tensors = {n: getattr(context, n) for n in ("prefix_ids", "context_ids", "kept_bits", "ranks")}
    for i, layer in enumerate(context.layers):
        for number, level in enumerate(layer.levels):
            name = f"{i}.{number}"
            tensors |= {f"{name}.cu_seqlens": level.cu_seqlens, f"{name}.bias": level.bias}
            for kind, pairs in (("keys", level.keys), ("values", level.values)):
                stored = {"": pairs} if isinstance(pairs, Tensor) else vars(pairs)
                tensors |= {f"{name}.{kind}.{n}": t for n, t in stored.items() if isinstance(t, Tensor)}
    if tail is not None:
        tensors["ids"] = tail.token_ids
        tensors |= {f"tail.{i}.keys": t for i, t in enumerate(tail.keys)}
        tensors |= {f"tail.{i}.values": t for i, t in enumerate(tail.values)}
    return tensors


def bits(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    return tensor.dtype, tuple(tensor.shape), bytes(tensor.contiguous().flatten().view(torch.uint8).numpy())


def both(level: RaggedLayer) -> tuple[Any, Any]:
    return level.keys, level.values


def same(a: Stored, b: Stored) -> bool:
    """Equal bit for bit, info, windows and turns included."""
    tensors_a, tensors_b = named(*a), named(*b)
    if tensors_a.keys() != tensors_b.keys() or a[0].info != b[0].info:
        return False
    if [(layer.window, layer.dtype) for layer in a[0].layers] != [(x.window, x.dtype) for x in b[0].layers]:
        return False
    layouts = [
        [store.tensors._layout_of(pairs) for layer in c.layers for level in layer.levels for pairs in both(level)]
        for c, _ in (a, b)
    ]
    if layouts[0] != layouts[1]:
        return False
    words = [(t and (t.turns, t.turn_starts)) for _, t in (a, b)]
    return words[0] == words[1] and all(bits(tensors_a[n]) == bits(tensors_b[n]) for n in tensors_a)


def digest_by_the_page(metadata: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """The sha256 as docs/file-format.md describes it, written from the page alone."""
    codes = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    codes |= {torch.int32: "I32", torch.uint8: "U8", torch.int64: "I64", torch.float64: "F64"}
    text = ""
    for key in sorted(set(metadata) - {"sha256"}):
        text += f"meta {key} {hashlib.sha256(metadata[key].encode()).hexdigest()}\n"
    for name in sorted(tensors):
        dtype, shape, data = bits(tensors[name])
        sizes = "x".join(str(n) for n in shape)
        text += f"tensor {name} {codes[dtype]} {sizes} {hashlib.sha256(data).hexdigest()}\n"
    return hashlib.sha256(text.encode()).hexdigest()


def parts_of(path: Path) -> Parts:
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    return metadata, load_file(path)


def forge(path: Path, metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
    """A safetensors file of these parts with the right sha256, so that only later checks can refuse it."""
    metadata = {k: v for k, v in metadata.items() if k != "sha256"}
    metadata["sha256"] = digest_by_the_page(metadata, tensors)
    save_file({n: t.clone() for n, t in tensors.items()}, path, metadata)


def assert_refused(path: Path, words: str = "", *, verify: bool = True) -> None:
    with pytest.raises(FormatError) as caught:
        store.read(path, verify=verify)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert "kvzip compress" in message
    assert words in message


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, Stored]:
    return put_away(tmp_path, FULL_SHAPE)


@pytest.fixture
def in_levels(tmp_path: Path) -> tuple[Path, Stored]:
    """A file of format version 2."""
    return put_away(tmp_path, LEVELS_SHAPE)


@pytest.fixture(params=[FULL_SHAPE, LEVELS_SHAPE], ids=["plain", "levels"])
def either(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Stored]:
    return put_away(tmp_path, request.param)


def put_away(folder: Path, shape: Shape) -> tuple[Path, Stored]:
    path = folder / "doc.kvz"
    context, tail = random_context(shape)
    store.write(path, context, tail)
    return path, (context, tail)


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.endswith(".tmp")]


# ---- round trip

shapes = st.builds(
    Shape,
    windows=st.lists(st.sampled_from([None, 2, 7, 4096]), max_size=3).flatmap(
        lambda windows: st.permutations([*windows, None]).map(tuple)
    ),
    num_kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([1, 3, 8]),
    prefix_len=st.integers(0, 3),
    context_len=st.integers(0, 20),
    keep=st.sampled_from([0.0, 0.3, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    has_bias=st.booleans(),
    has_ranks=st.booleans(),
    tail_len=st.none() | st.integers(0, 4),
    num_pending=st.integers(0, 1),
    turns=st.lists(st.tuples(st.text(max_size=8), st.text(max_size=8)), max_size=3).map(tuple),
)
layouts = st.none() | st.builds(
    Layout,
    bits=st.sampled_from([8, 4, 2]),
    axis=st.sampled_from(["token", "channel"]),
    group_size=st.sampled_from([4, 8]),
)
shapes |= shapes.flatmap(
    lambda shape: st.builds(
        lambda levels: replace(shape, head_dim=8, levels=tuple(levels)),
        st.lists(st.tuples(layouts, layouts), min_size=1, max_size=2),
    )
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=shapes, seed=st.integers(0, 9))
def test_round_trip(tmp_path: Path, shape: Shape, seed: int) -> None:
    path = tmp_path / "doc.kvz"
    original = random_context(shape, seed)
    nbytes = store.write(path, *original)
    assert nbytes == path.stat().st_size
    assert same(store.read(path), original)
    assert same(store.read(path, verify=False), original)


def test_bits_survive_that_are_not_numbers(tmp_path: Path) -> None:
    context, tail = random_context(FULL_SHAPE)
    context.layers[0].keys.view(torch.int32)[0] = torch.tensor([0x7FC00001, -1, -(2**31), 1])
    store.write(tmp_path / "doc.kvz", context, tail)
    assert same(store.read(tmp_path / "doc.kvz"), (context, tail))


def test_the_same_context_gives_the_same_bytes(either: tuple[Path, Stored], tmp_path: Path) -> None:
    store.write(tmp_path / "again.kvz", *store.read(either[0]))
    assert (tmp_path / "again.kvz").read_bytes() == either[0].read_bytes()


def test_tensors_that_share_storage_or_are_strided(tmp_path: Path) -> None:
    context, tail = random_context(FULL_SHAPE)
    assert tail is not None
    buffers = [torch.randn(1, 2, 64, 4) for _ in tail.keys]
    views = tuple(b[:, :, :6] for b in buffers)
    shared = dataclasses.replace(tail, keys=views, values=views)
    layers = tuple(dataclasses.replace(layer, values=layer.keys) for layer in context.layers)
    context = dataclasses.replace(context, layers=layers)
    store.write(tmp_path / "doc.kvz", context, shared)
    assert same(store.read(tmp_path / "doc.kvz"), (context, shared))


def test_a_file_may_be_written_over_the_one_it_was_read_from(either: tuple[Path, Stored]) -> None:
    path, original = either
    opened = store.read(path)
    store.write(path, opened[0])
    assert same(opened, original)
    assert same(store.read(path), (original[0], None))


def test_a_link_stays_a_link(stored: tuple[Path, Stored], tmp_path: Path) -> None:
    link = tmp_path / "link.kvz"
    link.symlink_to(stored[0])
    context, _ = random_context(Shape(), seed=1)
    store.write(link, context)
    assert link.is_symlink()
    assert same(store.read(stored[0]), (context, None))


def test_it_is_a_plain_safetensors_file(either: tuple[Path, Stored]) -> None:
    metadata, tensors = parts_of(either[0])
    keys = either[1][0].layers[0].keys
    assert bits(tensors["layers.0.keys"]) == bits(keys if isinstance(keys, Tensor) else keys.codes)
    assert metadata["format"] == "kvzip"
    assert metadata["sha256"] == digest_by_the_page(metadata, tensors)


def test_info_without_the_tensors(stored: tuple[Path, Stored]) -> None:
    path, (context, tail) = stored
    assert tail is not None
    data = bytearray(path.read_bytes())
    data[-200:] = os.urandom(200)
    path.write_bytes(data)
    header = store.read_info(path)
    assert header.info == INFO
    assert header.windows == FULL_SHAPE.windows
    assert (header.prefix_len, header.context_len) == (context.prefix_len, context.context_len)
    assert header.kv_nbytes == context.kv_nbytes
    assert (header.has_tail, header.turns, header.turn_starts) == (True, tail.turns, tail.turn_starts)


def test_fingerprint() -> None:
    store.check_fingerprint(INFO, INFO.fingerprint, "doc.kvz")
    with pytest.raises(ModelMismatchError, match=r"doc\.kvz.*'tiny'.*0123.*Other:9.*load the model") as caught:
        store.check_fingerprint(INFO, "Other:9", "doc.kvz")
    assert "\n" not in str(caught.value)


# ---- the committed file of format version 1


def v1_context() -> Stored:
    """Two layers, one of them sliding, of two heads; numbers that binary floats hold exactly."""
    mask = torch.tensor([[[True, False, True, False, False], [False] * 5]])
    kept = torch.arange(12.0).reshape(4, 3) / 8  # head 0: 1 of the prefix and 2 kept; head 1: 1 of the prefix
    recent = torch.arange(18.0).reshape(6, 3) - 4
    layers = (
        RaggedLayer(kept, -kept, torch.tensor([0, 3, 4], dtype=torch.int32), None, torch.arange(4.0)),
        RaggedLayer(recent, recent * 2, torch.tensor([0, 3, 6], dtype=torch.int32), 4),
    )
    ids = torch.arange(6, dtype=torch.int32)
    ranks = torch.arange(10, dtype=torch.uint8).reshape(1, 2, 5)
    context = RaggedContext(layers, ids[:1], ids[1:], pack_bits(mask), ranks, INFO)
    keys = tuple(torch.full((1, 2, 2, 3), float(i)) for i in range(2))
    return context, SavedTail(keys, keys, ids[:3], (("Qué?", "ja"),), (0,))


def make_v1_fixture() -> None:
    """Write tests/data/v1.kvz: `python -c 'import test_store; test_store.make_v1_fixture()'` in tests/.

    Ran once, when the format was fixed. A later format gets a file of its own; this one stays as it is.
    """
    store.write(FIXTURE, *v1_context())


def test_version_1_keeps_loading() -> None:
    assert FIXTURE.stat().st_size < 10_000
    assert same(store.read(FIXTURE), v1_context())


# ---- memory


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc/self/smaps")
def test_tensors_are_mapped_not_copied(tmp_path: Path) -> None:
    path = tmp_path / "doc.kvz"
    shape = Shape(windows=(None,) * 4, head_dim=64, context_len=20_000, keep=0.5)
    nbytes = store.write(path, random_context(shape)[0])
    context, _ = store.read(path)  # keeps the mapping alive
    lines = Path("/proc/self/smaps").read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if line.endswith(path.name))
    sizes = {line.split()[0]: int(line.split()[1]) * 1024 for line in lines[at + 1 : at + 20]}
    assert sizes["Rss:"] > 0.9 * nbytes  # verifying touched every page of the file ...
    assert sizes["Anonymous:"] == 0  # ... and none of them is a copy
    start, end = (int(x, 16) for x in lines[at].split()[0].split("-"))
    for tensor in named(context, None).values():
        assert tensor is None or start <= tensor.data_ptr() < end
    before = path.read_bytes()
    context.layers[0].keys.zero_()
    assert path.read_bytes() == before


def test_a_small_file_that_claims_much(tmp_path: Path) -> None:
    path = tmp_path / "doc.kvz"
    for claim in (1 << 24, 1 << 40, (1 << 63) - 1, (1 << 64) - 1):
        path.write_bytes(claim.to_bytes(8, "little") + b"{}")
        assert_refused(path)
    entry = {"dtype": "F32", "shape": [1 << 31, 1 << 31], "data_offsets": [0, 1 << 62]}
    for name in ("x", "layers.0.keys"):
        path.write_bytes(raw({name: entry}))
        assert_refused(path)


# ---- refusals


def raw(entries: dict[str, Any], data: bytes = b"", padding: int | None = None) -> bytes:
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8 if padding is None else padding)
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "content",
    [b"", b"\0", b"\0" * 8, b"\0" * 100, b"PK\x03\x04 zip", b"GGUF" + b"\0" * 60, b"plain text, quite long\n" * 9]
    + [raw({}), raw({"__metadata__": {}}), raw({"__metadata__": {"format": "pt"}})]
    + [(4).to_bytes(8, "little") + text for text in (b"[[[[", b"null", b"\xff\xff\xff\xff", b'{"a"')]
    + [(90_000).to_bytes(8, "little") + b"[" * 90_000],
)
def test_not_ours(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "doc.kvz"
    path.write_bytes(content)
    assert_refused(path)
    with pytest.raises(FormatError):
        store.read_info(path)


@pytest.mark.parametrize("reader", [store.read, store.read_info])
def test_paths_that_are_no_file(tmp_path: Path, reader: Callable[[Path], Any]) -> None:
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "missing.kvz", tmp_path, tmp_path / "pipe", tmp_path / "file" / "below.kvz"):
        with pytest.raises(FileError) as caught:
            reader(path)
        assert not isinstance(caught.value, FormatError)
        assert str(path) in str(caught.value)
    with pytest.raises(FileError):
        reader(tmp_path / "a\0b")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_no_permission(stored: tuple[Path, Stored], tmp_path: Path) -> None:
    stored[0].chmod(0)
    with pytest.raises(FileError, match="permission"):
        store.read(stored[0])
    tmp_path.chmod(0o555)
    with pytest.raises(FileError, match="permission"):
        store.write(tmp_path / "new.kvz", stored[1][0])


def test_a_later_version_asks_for_an_upgrade(stored: tuple[Path, Stored]) -> None:
    metadata, tensors = parts_of(stored[0])
    forge(stored[0], metadata | {"format_version": "3", "windows": "new rules"}, tensors)
    for reader in (store.read, store.read_info):
        with pytest.raises(FormatError, match=r"'3'.*reads versions up to 2.*pip install -U kvzip"):
            reader(stored[0])


def edit_info(**changes: Any) -> Callable[[Parts], None]:
    def edit(parts: Parts) -> None:
        info = {k: v for k, v in (json.loads(parts[0]["info"]) | changes).items() if v != "delete"}
        parts[0]["info"] = json.dumps(info)

    return edit


def edit_meta(key: str, value: str | None) -> Callable[[Parts], None]:
    def edit(parts: Parts) -> None:
        del parts[0][key]
        if value is not None:
            parts[0][key] = value

    return edit


def edit_tensor(name: str, change: Callable[[Tensor], Tensor] | None) -> Callable[[Parts], None]:
    def edit(parts: Parts) -> None:
        tensor = parts[1].pop(name)
        if change is not None:
            parts[1][name] = change(tensor)

    return edit


def put(index: int, value: int) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[index] = value
        return tensor

    return change


def each(change: Callable[[Tensor], Tensor], *, kinds: str) -> Callable[[Parts], None]:
    def edit(parts: Parts) -> None:
        for name in list(parts[1]):
            if name.endswith(tuple(kinds.split())):
                parts[1][name] = change(parts[1][name])

    return edit


def add(name: str) -> Callable[[Parts], None]:
    return lambda parts: parts[1].update({name: torch.zeros(1)})


def shorten(tensor: Tensor) -> Tensor:
    return tensor[:-1]


def of_type(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(dtype)


NO_TEXT: list[Any] = [None, 1, True, ["x"], {}]
NO_NUMBER: list[Any] = ["0.3", None, True, float("nan"), float("inf")]
NO_COUNT: list[Any] = [1.5, None, True, "1"]
NO_LOSS: list[Any] = [[], 1, {"kl": float("nan")}, {"kl": float("-inf")}]
REFUSALS: list[tuple[Callable[[Parts], None], str]] = [
    (edit_meta("format", None), "did not write it"),
    (edit_meta("format", "pt"), "did not write it"),
    *((edit_meta("format_version", v), "format version") for v in (None, "", "0", "-1", "1.0", "one", "²")),
    *((edit_meta(key, None), key) for key in ("info", "windows", "turns")),
    *((edit_meta(key, v), key) for key in ("info", "windows", "turns") for v in ("", "{", "1", "null", '"x"', "[1")),
    *((edit_meta("windows", v), "") for v in ("[]", "[null]", "[null,5,null,5]", "[5,5,5]", "[null,null,null]")),
    *((edit_meta("windows", f"[null,{v},null]"), "windows") for v in ("0", "-5", "true", "5.0", '"5"', "[5]", "1e99")),
    (edit_meta("windows", f"[{','.join(['null'] * 100_000)}]"), "100000 layers"),
    (edit_meta("windows", f"[null,{'9' * 9999},null]"), "windows"),
    (edit_meta("windows", "[null,3,null]"), "sliding-window layer 1"),
    *((edit_meta("turns", v), "turns") for v in ('[["a","b"]]', '["ab0"]', '[["a","b","c"]]', '[["a",1,0]]')),
    *((edit_meta("turns", f'[["a","b",{v}]]'), "") for v in ("-1", "8", "true", "0.0", "null")),
    (edit_meta("turns", '[["a","b",4],["a","b",3]]'), "starts of its turns"),
    (edit_meta("info", "[" * 100_000), "info"),
    (edit_meta("info", "{" * 5), "info"),
    *((edit_info(**{name: "delete"}), name) for name in ("model", "fingerprint", "keep_ratio", "keep_ratio_asked")),
    *((edit_info(model=v), "model") for v in NO_TEXT),
    *((edit_info(keep_ratio=v), "") for v in NO_NUMBER),
    *((edit_info(full_kv_nbytes=v), "full_kv_nbytes") for v in NO_COUNT),
    *((edit_info(loss=v), "") for v in NO_LOSS),
    (edit_meta("info", '{"keep_ratio": 1e999}'), "info"),
    (lambda parts: edit_info(loss=json.loads('{"a":' * 40 + "1" + "}" * 40))(parts), "nested"),
    *((edit_tensor(name, None), "") for name in ("prefix_ids", "context_ids", "kept_bits", "tail.token_ids")),
    *((edit_tensor(f"layers.1.{kind}", None), "layers.1") for kind in ("keys", "values", "cu_seqlens")),
    *((edit_tensor(f"tail.{i}.{kind}", None), "tail") for i in (0, 2) for kind in ("keys", "values")),
    (edit_tensor("layers.0.keys", None), "keys"),
    *((add(name), name) for name in ("x", "layers.3.keys", "layers.03.keys", "tail.3.keys", "layers.0.biass")),
    *((edit_tensor(f"layers.0.{k}", of_type(torch.float64)), "") for k in ("keys", "values", "bias")),
    *((edit_tensor(f"layers.2.{k}", of_type(torch.float16)), "F16") for k in ("keys", "values", "bias")),
    (each(of_type(torch.float64), kinds="keys values"), "dtype"),
    (each(of_type(torch.int32), kinds="keys values"), "dtype"),
    (edit_tensor("tail.1.keys", of_type(torch.bfloat16)), "BF16"),
    *((edit_tensor(n, of_type(torch.int64)), "I64") for n in ("prefix_ids", "layers.0.cu_seqlens", "kept_bits")),
    *((edit_tensor(n, of_type(torch.int32)), "I32") for n in ("ranks", "kept_bits")),
    *((edit_tensor(f"layers.0.{k}", shorten), "") for k in ("keys", "values", "cu_seqlens", "bias")),
    *((edit_tensor(name, shorten), "") for name in ("prefix_ids", "context_ids", "kept_bits", "ranks")),
    *((edit_tensor(n, lambda t: t[None]), "") for n in ("prefix_ids", "layers.0.keys", "layers.0.cu_seqlens")),
    (edit_tensor("prefix_ids", lambda t: t.sum()), "prefix_ids"),
    (edit_tensor("layers.0.keys", lambda t: t[:, :3].contiguous()), "KV heads"),
    (each(lambda t: t[..., :0].contiguous(), kinds="keys values"), "KV heads"),
    (edit_tensor("layers.0.cu_seqlens", lambda t: t[:1]), ""),
    (edit_tensor("layers.0.cu_seqlens", lambda t: t[:0]), ""),
    (edit_tensor("layers.0.cu_seqlens", lambda t: t[[0, 2]]), ""),
    (edit_tensor("layers.0.cu_seqlens", put(0, 1)), "offsets of 'layers.0'"),
    (edit_tensor("layers.0.cu_seqlens", put(1, -1)), "offsets of 'layers.0'"),
    (edit_tensor("layers.0.cu_seqlens", put(1, 2**31 - 1)), "offsets of 'layers.0'"),
    (edit_tensor("layers.0.cu_seqlens", put(2, 5)), "offsets of 'layers.0'"),
    (edit_tensor("layers.0.cu_seqlens", put(1, 3)), "keep mask"),
    (edit_tensor("layers.1.cu_seqlens", put(1, 3)), "sliding-window layer 1"),
    (edit_tensor("layers.1.cu_seqlens", lambda t: t - torch.arange(3, dtype=torch.int32)), "offsets of 'layers.1'"),
    (edit_tensor("kept_bits", lambda t: t ^ 1), "keep mask"),
    (edit_tensor("kept_bits", lambda t: t | put(-1, 128)(torch.zeros_like(t))), "after the last entry"),
    *((edit_tensor(name, put(-1, -1)), name) for name in ("prefix_ids", "context_ids", "tail.token_ids")),
    (edit_tensor("tail.token_ids", lambda t: t[:5]), "tail.token_ids"),
    (edit_tensor("tail.token_ids", lambda t: torch.cat([t, t])), "tail.token_ids"),
    (edit_tensor("tail.1.values", lambda t: t[:, :, :5].contiguous()), "tail.1.values"),
    (edit_tensor("tail.0.keys", lambda t: t[0]), "tail.0.keys"),
    (each(lambda t: torch.cat([t, t]), kinds="tail.0.keys tail.0.values"), "tail.0"),
]


def edit_storage(change: Callable[[Any], None]) -> Callable[[Parts], None]:
    def edit(parts: Parts) -> None:
        content = json.loads(parts[0]["storage"])
        change(content)
        parts[0]["storage"] = json.dumps(content)

    return edit


def put_layout(**changes: Any) -> Callable[[Parts], None]:
    """Change the layout of the keys of the first level."""
    return edit_storage(lambda content: content["levels"][0][0][0].update(changes))


STORAGE_REFUSALS: list[tuple[Callable[[Parts], None], str]] = [
    *((edit_meta("storage", v), "storage") for v in (None, "", "[]", "null", '{"code":"F32"}', '{"levels":[]}')),
    *((edit_storage(lambda c, v=v: c.update(code=v)), "") for v in ("F64", "U8", None, 1, "BF16", ["F32"])),
    *((edit_storage(lambda c, v=v: c.update(levels=v)), "") for v in (None, {}, [], [[]], [[[None, None]]], [1, 2, 3])),
    (edit_storage(lambda c: c["levels"].append(c["levels"][0])), ""),
    (edit_storage(lambda c: c["levels"][0].append(c["levels"][0][0])), "layers.0.2"),
    (edit_storage(lambda c: c["levels"][0].pop()), "layers.0.1"),
    (edit_storage(lambda c: c["levels"].__setitem__(1, c["levels"][0])), ""),
    (edit_storage(lambda c: c["levels"][0][0].append(None)), "pair of layouts"),
    (edit_storage(lambda c: c["levels"][0][0].__setitem__(0, None)), "U8"),
    (edit_storage(lambda c: c["levels"][0][0].__setitem__(0, [8])), "not an object"),
    *((put_layout(bits=v), "") for v in (16, 4, 0, -8, "8", None, True, 8.5)),
    *((put_layout(axis=v), "") for v in ("channel", "row", None, 1, [])),
    *((put_layout(group_size=v), "") for v in (8, 3, 0, -4, 1 << 40, "4", None, True, 4.0)),
    *((edit_tensor(f"layers.0.keys.{n}", shorten), "layers.0.keys") for n in ("scales", "zeros")),
    *((edit_tensor(f"layers.0.keys.{n}", None), "layers.0.keys") for n in ("scales", "zeros")),
    *((edit_tensor(f"layers.0.values.{n}", of_type(torch.float32)), "F16") for n in ("scales", "zeros")),
    (each(lambda t: torch.cat([t, t]), kinds="layers.0.values.scales layers.0.values.zeros"), "groups"),
    (edit_tensor("layers.0.1.cu_seqlens", put(1, 3)), ""),
    (edit_tensor("layers.0.1.cu_seqlens", put(1, -1)), "offsets of 'layers.0.1'"),
    (edit_tensor("layers.0.1.keys", of_type(torch.int32)), "I32"),
    (edit_tensor("layers.0.1.keys", lambda t: t[:, :1].contiguous()), ""),
    *((add(name), name) for name in ("layers.0.2.keys", "layers.0.0.keys", "layers.1.keys.scales", "layers.0.1.x")),
    (edit_meta("format_version", "1"), ""),
]


@pytest.mark.parametrize(("edit", "words"), STORAGE_REFUSALS, ids=[str(i) for i in range(len(STORAGE_REFUSALS))])
def test_refusals_of_what_is_said_of_storage(
    in_levels: tuple[Path, Stored], edit: Callable[[Parts], None], words: str
) -> None:
    test_refusals_with_a_right_sha256(in_levels, edit, words)


@pytest.mark.parametrize(("edit", "words"), REFUSALS, ids=[str(i) for i in range(len(REFUSALS))])
def test_refusals_with_a_right_sha256(stored: tuple[Path, Stored], edit: Callable[[Parts], None], words: str) -> None:
    path, _ = stored
    parts = parts_of(path)
    edit(parts)
    forge(path, *parts)
    with pytest.raises(FormatError) as caught:
        store.read(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert "sha256" not in str(caught.value)


def test_the_forger_itself_is_believed(either: tuple[Path, Stored]) -> None:
    forge(either[0], *parts_of(either[0]))
    assert same(store.read(either[0]), either[1])


def test_later_keys_in_the_info_are_ignored(stored: tuple[Path, Stored]) -> None:
    parts = parts_of(stored[0])
    edit_info(key_of_a_later_version=[1], prefill_s="delete", keep_ratio=1)(parts)
    forge(stored[0], *parts)
    assert store.read(stored[0])[0].info == dataclasses.replace(INFO, keep_ratio=1)


def test_data_that_is_not_aligned(stored: tuple[Path, Stored]) -> None:
    path, original = stored
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for padding in range(9):
        path.write_bytes(raw(json.loads(content[8:start]), content[start:], padding))
        with suppress(FormatError):
            assert same(store.read(path), original)


BROKEN: list[Callable[[RaggedContext, SavedTail], Stored]] = [
    lambda c, t: (dataclasses.replace(c, prefix_ids=c.prefix_ids.long()), t),
    lambda c, t: (dataclasses.replace(c, context_ids=c.context_ids[1:]), t),
    lambda c, t: (dataclasses.replace(c, layers=c.layers[:2]), t),
    lambda c, t: (dataclasses.replace(c, kept_bits=c.kept_bits ^ 1), t),
    lambda c, t: (dataclasses.replace(c, info=dataclasses.replace(INFO, loss={"kl": float("nan")})), t),
    lambda c, t: (dataclasses.replace(c, info=dataclasses.replace(INFO, model=Path("x"))), t),  # type: ignore[arg-type]
    lambda c, t: (dataclasses.replace(c, info=dataclasses.replace(INFO, keep_ratio=None)), t),  # type: ignore[arg-type]
    lambda c, t: (dataclasses.replace(c, info=dataclasses.replace(INFO, system="x" * (1 << 24))), t),
    lambda c, t: (c.to("cpu", torch.float64), t),
    lambda c, t: (c.to("cpu", torch.float16), t),
    lambda c, t: (c, dataclasses.replace(t, keys=t.keys[:2])),
    lambda c, t: (c, dataclasses.replace(t, turn_starts=())),
    lambda c, t: (c, dataclasses.replace(t, turn_starts=(5, 2))),
]


@pytest.mark.parametrize("breaking", BROKEN, ids=[str(i) for i in range(len(BROKEN))])
def test_what_could_not_be_read_back_is_not_written(tmp_path: Path, breaking: Callable[..., Stored]) -> None:
    with pytest.raises(InputError, match="can't store") as caught:
        store.write(tmp_path / "doc.kvz", *breaking(*random_context(FULL_SHAPE)))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


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
