"""The methods that share layers, their sessions, and what their files say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import llama, tiny_tokenizer

import kvzip
from kvzip import store
from kvzip.context import RaggedContext
from kvzip.errors import FormatError, InputError, ModelError
from kvzip.options import CompressOptions
from kvzip.profiles import profile_path
from kvzip.session import Session
from kvzip.sharing import load_shared_layers, save_shared_layers

TEXT = "The quick brown fox jumps over the lazy dog. A lamp burned in the tower! Who saw it? " * 4


@pytest.fixture
def llm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> kvzip.LLM:
    monkeypatch.setenv("KVZIP_CACHE", str(tmp_path / "cache"))
    made = kvzip.wrap(llama(), tiny_tokenizer())
    save_shared_layers(made.fingerprint, {2: 0, 4: 3}, "a test")
    return made


def test_alone_it_evicts_nothing_and_holds_less(llm: kvzip.LLM) -> None:
    plain, sharing = llm.compress(TEXT, 1.0), llm.compress(TEXT, method="kvsharer")
    assert sharing.data.shared == {2: 0, 4: 3} and sharing.data.info.keep_ratio == 1.0
    assert sharing.data.kv_nbytes * 5 == plain.data.kv_nbytes * 3
    assert sharing.data.info.full_kv_nbytes == plain.data.info.full_kv_nbytes
    assert sharing.data.info.method == "kvsharer"


@pytest.mark.parametrize(
    "method", ["kvzip+kvsharer", "snapkv:window_size=8+kvsharer", "h2o+kvsharer+int4", "kvzip-plus+kvsharer"]
)
def test_it_composes_and_is_read_anew_by_what_was_read_without(llm: kvzip.LLM, method: str) -> None:
    options = CompressOptions(method=method, keep_ratio=0.5)
    prefilled = llm.prefill(TEXT)
    before = prefilled.compress(1.0).data
    later, at_once = prefilled.compress(options).data, llm.compress(TEXT, 0.5, method=method).data
    assert later.shared == at_once.shared == {2: 0, 4: 3}
    assert torch.equal(later.kept_bits, at_once.kept_bits)
    assert later.keep_mask.float().mean() == pytest.approx(0.5, abs=1e-3)
    assert len(prefilled._shared) == 1 and prefilled.compress(options) and len(prefilled._shared) == 1
    after = prefilled.compress(1.0).data
    assert not after.shared and torch.equal(before.layers[2].keys, after.layers[2].keys)


def test_a_map_of_no_layers_changes_nothing(llm: kvzip.LLM) -> None:
    save_shared_layers(llm.fingerprint, {}, "a test")
    plain, sharing = llm.compress(TEXT, 0.5), llm.compress(TEXT, 0.5, method="kvzip+kvsharer")
    assert torch.equal(plain.data.kept_bits, sharing.data.kept_bits)
    for a, b in zip(plain.data.layers, sharing.data.layers, strict=True):
        assert torch.equal(a.keys, b.keys)


@pytest.mark.parametrize("kind", ["head", "baklava"])
def test_other_profiles_leave_shared_layers_out(llm: kvzip.LLM, kind: str) -> None:
    llm.calibrate(kind, TEXT)
    method = {"head": "kvzip-head", "baklava": "kvzip+baklava"}[kind]
    data = llm.compress(TEXT, 0.5, method=f"{method}+kvsharer").data
    assert data.kept_shape[0] == 3 and data.shared == {2: 0, 4: 3}


def test_a_number_of_layers_is_for_sharing_alone(llm: kvzip.LLM) -> None:
    with pytest.raises(InputError, match="for kvsharer alone"):
        llm.calibrate("head", TEXT, num_layers=2)


@pytest.mark.parametrize("content", [None, "", "[]", '{"shared": [[1, 2]]}', '{"shared": [[2, "a"]]}', "OTHER"])
def test_a_profile_that_is_missing_or_does_not_fit_is_refused_before_any_work(
    llm: kvzip.LLM, content: str | None
) -> None:
    path = profile_path("kvsharer", llm.fingerprint)
    if content is None:
        path.unlink()
    else:
        other = json.dumps({"fingerprint": "another", "shared": [[2, 0]]})
        path.write_text(other if content == "OTHER" else content)
    with pytest.raises(ModelError, match=re.escape("kvzip calibrate --method kvsharer")) as caught:
        llm.compress(TEXT, method="kvsharer")
    assert "\n" not in str(caught.value)


def test_a_profile_that_was_found_is_the_one_that_is_used(llm: kvzip.LLM) -> None:
    llm.calibrate("kvsharer", TEXT, num_layers=2)
    assert len(load_shared_layers(llm.fingerprint, llm.geometry)) <= 2


def test_a_saved_session_goes_on_as_it_was(llm: kvzip.LLM, tmp_path: Path) -> None:
    context = llm.compress(TEXT, 0.5, method="kvzip+kvsharer")
    chat = context.session()
    chat.ask("Who?", max_new_tokens=4)
    chat.save(tmp_path / "chat.kvz")
    names = store_names(tmp_path / "chat.kvz")
    assert not {n for n in names if re.match(r"(layers|tail)\.[24]\.", n)} and "tail.3.keys" in names
    opened = llm.open_session(tmp_path / "chat.kvz")
    assert isinstance(opened, Session) and opened.context.data.shared == {2: 0, 4: 3}
    assert str(opened.ask("And why?", max_new_tokens=6)) == str(chat.ask("And why?", max_new_tokens=6))
    context.save(tmp_path / "a.kvz")
    llm.open(tmp_path / "a.kvz").save(tmp_path / "b.kvz")
    assert (tmp_path / "a.kvz").read_bytes() == (tmp_path / "b.kvz").read_bytes()
    empty = context.session()
    empty.save(tmp_path / "empty.kvz")
    assert llm.open_session(tmp_path / "empty.kvz").turns == []


def store_names(path: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return set(file.keys())


# ---- what a file says of shared layers


def said(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def open_with(path: Path, metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> RaggedContext:
    from safetensors.torch import save_file

    save_file(tensors, path, metadata)
    return store.read(path, verify=False)[0]


BAD_MAPS = [
    [], None, 1, "2", {"2": 3}, {"2": 2}, {"2": -1}, {"2": "0"}, {"2": True}, {"2": 0.0}, {"2": None}, {"2": [0]},
    {"a": 0}, {"02": 0}, {"5": 0}, {"-1": 0}, {"4": 2, "2": 0}, {"0": 0}, {}, {"2": 0}, {"2": 0, "4": 3, "1": 0},
]  # fmt: skip


@pytest.mark.parametrize("shared", BAD_MAPS, ids=str)
def test_a_map_that_can_not_be_is_refused(llm: kvzip.LLM, tmp_path: Path, shared: Any) -> None:
    llm.compress(TEXT, 0.5, method="kvzip+kvsharer").save(tmp_path / "a.kvz")
    metadata, tensors = said(tmp_path / "a.kvz")
    storage = json.loads(metadata["storage"])
    assert storage["shared"] == {"2": 0, "4": 3} and storage["levels"][2] == []
    metadata["storage"] = json.dumps(storage | {"shared": shared})
    with pytest.raises(FormatError) as caught:
        open_with(tmp_path / "b.kvz", metadata, tensors)
    assert "\n" not in str(caught.value)


def test_a_window_is_not_shared(llm: kvzip.LLM, tmp_path: Path) -> None:
    llm.compress(TEXT, 0.5, method="kvzip+kvsharer").save(tmp_path / "a.kvz")
    metadata, tensors = said(tmp_path / "a.kvz")
    for layer in (2, 0):
        windows = [8 if i == layer else None for i in range(5)]
        with pytest.raises(FormatError, match="sliding-window layer"):
            open_with(tmp_path / "b.kvz", metadata | {"windows": json.dumps(windows)}, tensors)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 6) | st.floats() | st.sampled_from(["0", "1", "2", "4", "x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(list("0123456a")), inner, max_size=4),
    max_leaves=6,
)


@given(content=json_values)
def test_any_map_is_refused_or_is_one_that_can_be(content: Any) -> None:
    try:
        shared = store.layout._shared_in(content, 5)
    except store.refusal.Refused:
        return
    assert all(0 <= source < layer < 5 and source not in shared for layer, source in shared.items())
    assert {str(layer): source for layer, source in shared.items()} == content
