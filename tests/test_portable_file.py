"""The portable file: round trips, damage, forgeries, and the command that makes it."""

from __future__ import annotations

import json
import random
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import call
from stored import digest_by_the_page, forge, leftovers, parts_of
from tiny import tiny_model, tiny_tokenizer
from torch import Tensor

import kvzip
from kvzip import store
from kvzip.export import make_portable
from kvzip.portable import PortableContext, PortableLayer
from kvzip.store import portable

TEXT = "The lamp was lit in May. It burned all night.\n" * 6
JSON_KEYS = {
    "path", "file_nbytes", "num_pairs", "prefix_len", "logical_len", "kv_nbytes", "full_kv_nbytes", "model", "method",
    "dtype", "keep_ratio_asked", "keep_ratio", "loss", "prefill_s", "total_s", "sha256", "origin",
}  # fmt: skip


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def case(request: pytest.FixtureRequest) -> SimpleNamespace:
    """A model with a compressed text."""
    llm = kvzip.wrap(tiny_model(request.param), tiny_tokenizer())
    return SimpleNamespace(llm=llm, context=llm.compress(TEXT, 0.4))


@pytest.fixture
def written(case: SimpleNamespace, tmp_path: Path) -> tuple[Path, PortableContext]:
    path = tmp_path / "doc.kvp.safetensors"
    context = make_portable(case.llm, case.context.data)
    portable.write(path, context)
    return path, context


def tensors_of(context: PortableContext) -> list[Tensor]:
    return [tensor for layer in context.layers for tensor in (layer.keys, layer.values)]


def assert_refused(path: Path, words: str = "", *, verify: bool = True) -> None:
    with pytest.raises(kvzip.FormatError) as caught:
        portable.read(path, verify=verify)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and words in message
    assert "kvzip export --portable" in message or "upgrade kvzip" in message


def test_what_is_written_is_read(written: tuple[Path, PortableContext]) -> None:
    path, context = written
    for verify in (True, False):
        found = portable.read(path, verify=verify)
        assert all(
            a.equal(b) and a.dtype == b.dtype for a, b in zip(tensors_of(found), tensors_of(context), strict=True)
        )
        assert (found.info, found.origin, found.prefix_len, found.logical_len) == (
            context.info, context.origin, context.prefix_len, context.logical_len,
        )  # fmt: skip
        assert [layer.window for layer in found.layers] == [layer.window for layer in context.layers]
    before = path.read_bytes()
    portable.write(path, context)
    assert path.read_bytes() == before and not leftovers(path.parent)


def test_the_header_says_what_the_tensors_are(written: tuple[Path, PortableContext]) -> None:
    path, context = written
    info, (metadata, tensors) = portable.read_info(path), parts_of(path)
    assert (info.num_pairs, info.prefix_len, info.logical_len) == (
        context.num_pairs, context.prefix_len, context.logical_len,
    )  # fmt: skip
    assert info.heads == tuple((layer.keys.shape[1], layer.keys.shape[2]) for layer in context.layers)
    assert info.kv_nbytes == context.kv_nbytes == sum(t.nbytes for t in tensors.values())
    assert info.dtype == torch.float32 and info.info == context.info and info.origin == context.origin
    assert info.sha256 == metadata["sha256"] == digest_by_the_page(metadata, tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_coarse_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    llm = kvzip.wrap(tiny_model("llama").to(dtype), tiny_tokenizer())
    exact = kvzip.wrap(llm.model, llm.tokenizer)
    info = llm.compress(TEXT, 0.5, certify=False).export(tmp_path / "doc", certify=False)
    assert info.dtype == dtype and portable.read(tmp_path / "doc").layers[0].keys.dtype == dtype
    assert exact.fingerprint == info.info.fingerprint


def test_cut_anywhere(written: tuple[Path, PortableContext]) -> None:
    path, _ = written
    content = path.read_bytes()
    step = len(content) // 60
    for length in (*range(40), *range(0, len(content), step), *range(len(content) - 40, len(content))):
        path.write_bytes(content[:length])
        assert_refused(path, verify=bool(length % 2))
    path.write_bytes(content + b"\0")
    assert_refused(path)


def test_flipped_bits_anywhere(written: tuple[Path, PortableContext]) -> None:
    path, context = written
    content, rng = path.read_bytes(), random.Random(0)
    header_len = int.from_bytes(content[:8], "little")
    for round_ in range(200):
        damaged = bytearray(content)
        damaged[rng.randrange(8 + header_len if round_ % 2 else len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with suppress(kvzip.FormatError):
            found = portable.read(path)  # only where a space of the header became another one
            assert (found.info, found.origin, found.logical_len) == (context.info, context.origin, context.logical_len)
            assert all(a.equal(b) for a, b in zip(tensors_of(found), tensors_of(context), strict=True))


JUNK: list[Any] = [
    "",
    "null",
    "-1",
    "0",
    "3",
    "1e9",
    "99999999999",
    "[]",
    "{}",
    "[null]",
    "NaN",
    '{"loss": {"kl": -1}}',
    "x",
]


@pytest.mark.parametrize(
    "name", ["format_version", "num_pairs", "prefix_len", "logical_len", "windows", "info", "origin"]
)
def test_wrong_metadata_is_refused(written: tuple[Path, PortableContext], name: str) -> None:
    path, _ = written
    metadata, tensors = parts_of(path)
    for value in (None, *JUNK):
        wrong = {k: v for k, v in metadata.items() if k != name} | ({} if value is None else {name: value})
        fits = name == "prefix_len" and value in ("0", "3")  # another prefix would be possible
        forge(path, wrong, tensors)
        if not fits:
            assert_refused(path)


@pytest.mark.parametrize(
    "member",
    [{"method": 1}, {"keep_ratio": 2}, {"keep_ratio": "a"}, {"kv_nbytes": -1}, {"kv_nbytes": 1.5}, {"left_out": "codes"},
     {"left_out": [1]}, {"loss": []}, {"loss": {"agreement": 2}}],
)  # fmt: skip
def test_a_wrong_origin_is_refused(written: tuple[Path, PortableContext], member: dict[str, Any]) -> None:
    path, _ = written
    metadata, tensors = parts_of(path)
    forge(path, metadata | {"origin": json.dumps(json.loads(metadata["origin"]) | member)}, tensors)
    assert_refused(path, "origin")


def test_wrong_tensors_are_refused(written: tuple[Path, PortableContext]) -> None:
    path, _ = written
    metadata, tensors = parts_of(path)
    name = "layers.1.values"
    for wrong in (
        None,
        tensors[name][1:],
        tensors[name][:, :1],
        tensors[name].half(),
        tensors[name].flatten(),
        tensors[name].long(),
    ):
        found = {k: v for k, v in tensors.items() if k != name} | ({} if wrong is None else {name: wrong})
        forge(path, metadata, found)
        assert_refused(path)
    forge(path, metadata, tensors | {"extra": torch.zeros(1)})
    assert_refused(path)
    empty = {k: v[..., :0] if k.startswith("layers.1") else v for k, v in tensors.items()}
    forge(path, metadata, empty)
    assert_refused(path, "heads")


def test_a_file_of_a_later_version_says_so(written: tuple[Path, PortableContext]) -> None:
    path, _ = written
    metadata, tensors = parts_of(path)
    forge(path, metadata | {"format_version": "2"}, tensors)
    assert_refused(path, "pip install -U kvzip")


def test_neither_kind_is_taken_for_the_other(case: SimpleNamespace, written: tuple[Path, PortableContext]) -> None:
    path, _ = written
    with pytest.raises(kvzip.FormatError, match="portable layout"):
        store.read(path)
    case.context.save(path)
    assert_refused(path, "not a portable file")
    with pytest.raises(kvzip.FileError, match="No such file"):
        portable.read_info(path.parent / "nothing")


def test_parts_that_do_not_fit_are_not_written(written: tuple[Path, PortableContext]) -> None:
    path, context = written
    before, layer = path.read_bytes(), context.layers[-1]
    for wrong in (
        PortableLayer(layer.keys[1:], layer.values[1:], layer.window),
        PortableLayer(layer.keys.long(), layer.values),
    ):
        with pytest.raises(kvzip.InputError, match="can't store"):
            portable.write(path, replace(context, layers=(*context.layers[:-1], wrong)))
    with pytest.raises(kvzip.InputError, match="can't store"):
        portable.write(path, replace(context, logical_len=context.num_pairs - 1))
    with pytest.raises(kvzip.FileError):
        portable.write(path.parent, context)
    assert path.read_bytes() == before and not leftovers(path.parent)


# ---- the command


def test_the_command_writes_and_says_what_it_cost(tiny_kvz: Path, monkeypatch, capsys, tmp_path: Path) -> None:
    code, out, err = call(monkeypatch, capsys, tmp_path, "export", tiny_kvz, "--portable")
    info = portable.read_info(tmp_path / "text.kvp.safetensors")
    assert (code, err) == (0, "")
    assert re.search(rf"^Slots +{info.num_pairs} in every head", out, re.MULTILINE)
    assert re.search(r"^Loss +\S+ nats a token", out, re.MULTILINE)
    assert re.search(r"^Of the \.kvz +\S+ nats a token", out, re.MULTILINE)
    assert not any(line != line.rstrip() for line in out.splitlines())
    code, out, err = call(
        monkeypatch, capsys, tmp_path, "export", tiny_kvz, "--portable", "-r", "0.7", "--no-certificate", "--json"
    )
    found = json.loads(out)
    assert (code, err) == (0, "") and found.keys() >= JSON_KEYS
    assert found["loss"] is None and found["origin"]["loss"]["kl"] >= 0
    assert found["keep_ratio"] == pytest.approx(0.7, abs=0.01) and found["keep_ratio_asked"] == 0.7
    info = portable.read_info(tmp_path / found["path"])
    assert (info.num_pairs, info.sha256) == (found["num_pairs"], found["sha256"])


def test_inspect_prints_what_export_did(tiny_kvz: Path, monkeypatch, capsys, tmp_path: Path) -> None:
    name = "text.kvp.safetensors"
    for more in ((), ("--json",)):
        exported = call(
            monkeypatch, capsys, tmp_path, "export", tiny_kvz, "--portable", "--no-certificate", "--force", *more
        )
        assert call(monkeypatch, capsys, tmp_path, "inspect", name, *more) == exported and exported[0] == 0
    code, out, err = call(monkeypatch, capsys, tmp_path, "inspect", name, "--html", "page.html")
    assert (code, out) == (1, "") and "inspect the .kvz" in err and len(err.splitlines()) == 1
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    code, out, err = call(monkeypatch, capsys, tmp_path, "inspect", name)
    assert (code, out) == (1, "") and "sha256" in err and len(err.splitlines()) == 1


def test_the_command_refuses_in_one_line(tiny_kvz: Path, monkeypatch, capsys, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for words, *args in (
        ("one layout", tiny_kvz),
        ("keep ratio", tiny_kvz, "--portable", "-r", "2"),
        ("not a portable file", tiny_kvz, "--portable", "-o", "mine.txt"),
        ("does not exist", tiny_kvz, "--portable", "-o", "nowhere/doc"),
        ("No such file", "nothing.kvz", "--portable"),
        ("not a safetensors file", "mine.txt", "--portable"),
    ):
        code, out, err = call(monkeypatch, capsys, tmp_path, "export", *args)
        if words == "one layout":
            assert code == 2 and "--portable" in err
        else:
            assert code == 1 and words in err and len(err.splitlines()) == 1
        assert out == ""
    assert (tmp_path / "mine.txt").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1
    code, _, _ = call(monkeypatch, capsys, tmp_path, "export", tiny_kvz, "--portable", "-o", "mine.txt", "--force")
    assert code == 0 and portable.read_info(tmp_path / "mine.txt")
