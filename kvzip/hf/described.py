"""What a model folder is, learned from its files: for engines that load the weights themselves."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kvzip.errors import ModelError
from kvzip.hf.fingerprint import fingerprint
from kvzip.hf.geometry import LENGTH_DEPENDENT_ROPE, inv_freq_of, rope_types

PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


@dataclass(frozen=True)
class Described:
    """A model by its files.

    folder: where they are.  tokenizer: its own.  max_positions: that it was made for, or None.
    inv_freq: of each layer [R/2] float32, the rotary frequencies.
    """

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    max_positions: int | None
    inv_freq: tuple[Tensor, ...]
    model: PreTrainedModel  # on the meta device

    def fingerprint(self) -> str:
        """As `kvzip.hf.fingerprint.fingerprint` of the loaded model. Raises ModelError where weights can't be read."""
        with ExitStack() as stack:
            weights = _Weights(self.folder, stack)
            return fingerprint(self.model, self.tokenizer, ((n, weights.find(n)) for n in _names(self.model)))


def describe(
    name_or_path: str, *, revision: str | None = None, trust_remote_code: bool = False, fetch: bool = False
) -> Described:
    """Read config and tokenizer of a folder, or of a hub id whose files are in the hub's cache already.

    fetch: bring a hub id's files there first, the weights too.
    Raises ModelError for files that are not there or can't be used, or rotary frequencies that depend on the length.
    """
    folder = _folder(name_or_path, revision, fetch)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{name_or_path} can't be described: {reason}; give a folder or id of a text model") from error
    text = model.config.get_text_config(decoder=True)
    if bad := rope_types(text) & set(LENGTH_DEPENDENT_ROPE):
        raise ModelError(f"{name_or_path}: its rotary frequencies depend on the length ({', '.join(bad)}); not served")
    rotary = [_on_cpu(module, text) for module in model.get_decoder().modules() if _turns(module)]
    found = [inv_freq_of(rotary, text, index) for index in range(text.num_hidden_layers)]
    if not all(isinstance(freq, Tensor) for freq in found):
        raise ModelError(f"{name_or_path}: its layers have no rotary frequencies that kvzip finds; not served")
    limit = getattr(text, "max_position_embeddings", None)
    return Described(folder, tokenizer, limit, tuple(freq for freq in found if freq is not None), model)


def _folder(name_or_path: str, revision: str | None, fetch: bool) -> Path:
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    try:
        return Path(
            snapshot_download(
                name_or_path, revision=revision, allow_patterns=list(PATTERNS), local_files_only=not fetch
            )
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the files of {name_or_path!r} are not in the hub's cache{' and can not be fetched' if fetch else ''} "
            f"({type(error).__name__}): give a model folder"
        ) from error


def _turns(module: torch.nn.Module) -> bool:
    return any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False))


def _on_cpu(module: torch.nn.Module, config: Any) -> torch.nn.Module:
    """The same rotary embedding with numbers in it."""
    make: Any = type(module)
    found: torch.nn.Module = make(config=config)
    return found


def _names(model: PreTrainedModel) -> Iterable[str]:
    return (name for name, _ in model.named_parameters())


class _Weights:
    """Tensors of a checkpoint by name, mapped, read where they are touched."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._files: dict[str, Any] = {}
        paths = sorted(folder.glob("*.safetensors"))
        index = folder / "model.safetensors.index.json"
        try:
            if index.is_file():
                listed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
                paths = [folder / name for name in sorted(listed)]
            for path in paths:
                opened: Any = stack.enter_context(safe_open(str(path), framework="pt"))
                self._files |= dict.fromkeys(opened.keys(), opened)
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise ModelError(f"the weights of {folder} can't be read: {error}") from error

    def find(self, name: str) -> Tensor:
        if name not in self._files:
            raise ModelError(
                f"the model's files have no weights named {name!r} (as with quantized models), so kvzip can't tell "
                "which model it is: serve the model that the contexts were made with"
            )
        found: Tensor = self._files[name].get_tensor(name)
        return found
