"""The .kvz file: what is written comes back bit for bit, and nothing else ever does."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_context import INFO, Shape, random_context
from safetensors import safe_open
from stored import (
    FULL_SHAPE,
    Stored,
    assert_refused,
    bits,
    digest_by_the_page,
    named,
    parts_of,
    raw,
    same,
)
from torch import Tensor

from kvzip import store
from kvzip.context import RaggedContext, RaggedLayer, SavedTail
from kvzip.errors import ModelMismatchError
from kvzip.ops.quantize import Layout
from kvzip.ops.ragged import pack_bits

FIXTURE = Path(__file__).parent / "data" / "v1.kvz"


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
    half_bias=st.booleans(),
    has_ranks=st.booleans(),
    tail_len=st.none() | st.integers(0, 4),
    num_pending=st.integers(0, 1),
    turns=st.lists(st.tuples(st.text(max_size=8), st.text(max_size=8)), max_size=3).map(tuple),
)
planar_layouts = st.builds(
    Layout,
    bits=st.sampled_from([8, 4, 2]),
    axis=st.sampled_from(["token", "channel"]),
    group_size=st.sampled_from([4, 8]),
)
stream_layouts = st.builds(
    Layout, bits=st.sampled_from([6, 5, 3]), axis=st.sampled_from(["token", "channel"]), group_size=st.just(8)
)
mixed_layouts = st.builds(
    Layout, bits=st.sampled_from([4, 3]), axis=st.just("channel"), group_size=st.just(5), mixed=st.just(True)
)
layouts = st.none() | planar_layouts | stream_layouts | mixed_layouts
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


@pytest.mark.parametrize("half_bias", [False, True])
def test_biases_in_16_bits_are_of_version_2(half_bias: bool, tmp_path: Path) -> None:
    """Readers of version 1 know biases in 32 bits alone."""
    path = tmp_path / "doc.kvz"
    store.write(path, *random_context(Shape(has_bias=True, half_bias=half_bias)))
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format_version"] == ("2" if half_bias else "1")
    assert store.read(path)[0].layers[0].bias.dtype == (torch.float16 if half_bias else torch.float32)


def test_a_small_file_that_claims_much(tmp_path: Path) -> None:
    path = tmp_path / "doc.kvz"
    for claim in (1 << 24, 1 << 40, (1 << 63) - 1, (1 << 64) - 1):
        path.write_bytes(claim.to_bytes(8, "little") + b"{}")
        assert_refused(path)
    entry = {"dtype": "F32", "shape": [1 << 31, 1 << 31], "data_offsets": [0, 1 << 62]}
    for name in ("x", "layers.0.keys"):
        path.write_bytes(raw({name: entry}))
        assert_refused(path)
