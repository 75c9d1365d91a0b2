"""Files that can't be used are refused, whatever they say, and so is what could not be read back."""

from __future__ import annotations

import dataclasses
import json
import os
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from random_context import INFO, random_context
from stored import (
    FULL_SHAPE,
    MIXED_SHAPE,
    Parts,
    Stored,
    assert_refused,
    forge,
    parts_of,
    put_away,
    raw,
    same,
)
from torch import Tensor

from kvzip import store
from kvzip.context import LOSS_RANGES, RaggedContext, SavedTail
from kvzip.errors import FileError, FormatError, InputError
from kvzip.inspect import summary


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
    forge(stored[0], metadata | {"format_version": "4", "windows": "new rules"}, tensors)
    for reader in (store.read, store.read_info):
        with pytest.raises(FormatError, match=r"'4'.*reads versions up to 3.*pip install -U kvzip"):
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
NO_LOSS: list[Any] = [
    [], 1, {"kl": float("nan")}, {"kl": float("-inf")}, {"kl": -0.1}, {"kl": "0"}, {"kl": None}, {"kl": True}, {"kl": [0]},
    {"kl_bound": {}}, {"agreement": 1.01}, {"agreement": -1}, {"confidence": 2}, {"tokens": 0}, {"spans": 0.5},
    {"repeated": "x"}, {"repeated_full": 9}, {"seconds": -1},
]  # fmt: skip
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


MIXED_REFUSALS: list[tuple[Callable[[Parts], None], str]] = [
    (edit_meta("format_version", "2"), "layouts that format version 2 does not know"),
    (edit_meta("format_version", "1"), ""),
    *((edit_tensor("layers.0.values.widths", put(i, 9)), "0 to 8 bits, 3 on average") for i in (0, 15)),
    (edit_tensor("layers.0.values.widths", lambda t: t + 1), "0 to 8 bits, 3 on average"),
    (edit_tensor("layers.0.1.keys.widths", lambda t: t.flip(0) * 0), "0 to 8 bits, 3 on average"),
    (edit_tensor("layers.0.values.widths", lambda t: t[:1].contiguous()), "layers.0.values.widths"),
    (edit_tensor("layers.0.values.widths", lambda t: t[:, :7].contiguous()), "layers.0.values.widths"),
    (edit_tensor("layers.0.values.widths", of_type(torch.int32)), "U8"),
    (edit_tensor("layers.0.values.widths", None), "layers.0.values.widths"),
    (add("layers.0.keys.widths"), "layers.0.keys.widths"),
    *((edit_storage(lambda c, v=v: c["levels"][0][0][1].update(v)), "") for v in (
        {"mixed": False}, {"mixed": 1}, {"rotated": 0}, {"mixed": None}, {"axis": "token"}, {"bits": 7}, {"bits": 4}, {"bits": 3.0},
    )),
]  # fmt: skip


def test_any_loss_is_within_its_ranges_or_refused(stored: tuple[Path, Stored]) -> None:
    rng, found = random.Random(0), {True: 0, False: 0}
    values = [0, 1, 0.5, -1, 1e300, 10**400, True, None, "1", [], {}, float("nan"), float("inf")]
    for _ in range(200):
        names = rng.sample([*LOSS_RANGES, "later"], rng.randint(0, 3))
        parts = parts_of(stored[0])
        edit_info(loss={name: rng.choice(values[:3] if rng.random() < 0.5 else values) for name in names})(parts)
        forge(stored[0], *parts)
        loss = None
        with suppress(FormatError):
            loss = store.read(stored[0])[0].info.loss
        found[loss is not None] += 1
        known = [(value, *LOSS_RANGES[name]) for name, value in (loss or {}).items() if name in LOSS_RANGES]
        assert all(type(value) in (int, float) and low <= value <= high for value, low, high in known)
        assert summary.loss_line(loss or {}).isprintable()
    assert min(found.values()) > 20


@pytest.mark.parametrize(("edit", "words"), STORAGE_REFUSALS, ids=[str(i) for i in range(len(STORAGE_REFUSALS))])
def test_refusals_of_what_is_said_of_storage(
    in_levels: tuple[Path, Stored], edit: Callable[[Parts], None], words: str
) -> None:
    test_refusals_with_a_right_sha256(in_levels, edit, words)


@pytest.mark.parametrize(("edit", "words"), MIXED_REFUSALS, ids=[str(i) for i in range(len(MIXED_REFUSALS))])
def test_refusals_of_strings_of_bits(tmp_path: Path, edit: Callable[[Parts], None], words: str) -> None:
    test_refusals_with_a_right_sha256(put_away(tmp_path, MIXED_SHAPE), edit, words)


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
