"""A model folder described without its weights says what the loaded model does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import REAL_MODELS
from tiny import tiny_model, tiny_tokenizer

import kvzip
from kvzip.errors import ModelError
from kvzip.hf.described import describe
from kvzip.models.cache import model_folder


def saved(folder: Path, family: str, **options: object) -> Path:
    tiny_model(family).save_pretrained(folder, **options)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def check(folder: Path, llm: kvzip.LLM) -> None:
    found = describe(str(folder))
    assert found.fingerprint() == llm.fingerprint
    assert found.max_positions == llm.max_positions
    for own, layer in zip(found.inv_freq, llm.geometry.layers, strict=True):
        assert torch.equal(own, layer.inv_freq)
    assert next(found.model.parameters()).is_meta


@pytest.mark.parametrize("family", ["llama", "llama3.1", "qwen2", "qwen3", "phi3", "gemma2", "gemma3"])
def test_it_says_what_the_loaded_model_does(family: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, family)
    check(folder, kvzip.load(folder))


def test_weights_in_several_files(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama", max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    check(folder, kvzip.load(folder))


def test_other_weights_have_another_fingerprint(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama")
    before = describe(str(folder)).fingerprint()
    tiny_model("llama", seed=1).save_pretrained(folder)
    assert describe(str(folder)).fingerprint() != before


def test_what_can_not_be_described_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not in the hub's cache"):
        describe("nobody/nothing")
    with pytest.raises(ModelError, match="can't be described"):
        describe(str(tmp_path))
    folder = saved(tmp_path / "model", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}})
    )
    with pytest.raises(ModelError, match="depend on the length"):
        describe(str(folder))
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(ModelError, match="no weights named"):
        describe(str(folder)).fingerprint()


@pytest.mark.real
@pytest.mark.parametrize("name", REAL_MODELS)
def test_real_models(name: str) -> None:
    llm = kvzip.load(name)
    check(model_folder(name), llm)
