"""Models by name: the catalogue, a Hugging Face id, a local folder, or a GGUF file."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kvzip.errors import InputError, ModelError, UnknownNameError
from kvzip.llm import LLM
from kvzip.models.catalogue import CATALOGUE
from kvzip.models.fetch import ensure_gguf, ensure_model
from kvzip.progress import Progress, silent

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load(
    name_or_path: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    *,
    backend: str = "auto",
    thinking: bool = False,
    progress: Progress = silent,
    **from_pretrained: Any,
) -> LLM:
    """A model ready to compress.

    name_or_path: a name of the catalogue (`kvzip models`), a Hugging Face id, a local folder, or a .gguf file.
    dtype: "auto", "float32", "float16", "bfloat16" or a torch dtype; "auto" takes bfloat16 on a GPU that has it and
    float32 elsewhere (on most CPUs a bfloat16 product is hundreds of times slower).
    device: "auto" takes CUDA if present.
    thinking: let a thinking model think before it answers.  progress: called while a model is fetched.
    from_pretrained: passed on to transformers' `from_pretrained` (revision, token, device_map, ...).
    Raises UnknownNameError, FetchError, or ModelError with the reason.
    """
    chosen_device = choose_device(device)
    chosen_dtype = choose_dtype(dtype, chosen_device)
    folder = resolve(name_or_path, progress)
    logger.info("loading %s as %s on %s", name_or_path, chosen_dtype, chosen_device)
    tokenizer, model = _from_pretrained(folder, chosen_dtype, from_pretrained)
    if "device_map" not in from_pretrained:
        model = model.to(chosen_device)  # type: ignore[arg-type]
    return LLM(model, tokenizer, name=str(name_or_path), backend=backend, thinking=thinking)


def wrap(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    backend: str = "auto",
    thinking: bool = False,
) -> LLM:
    """Your own transformers model, ready to compress.

    Its attention implementation becomes `kvzip`, which is `sdpa` wherever no kvzip cache is passed.
    Raises ModelError, with the reason, for a model whose attention kvzip can't serve.
    """
    return LLM(model, tokenizer, backend=backend, thinking=thinking)


def choose_device(device: str | torch.device) -> torch.device:
    """The device meant by `device`. Raises InputError for one that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {str(device)!r} can't be used ({str(error).splitlines()[0]}): try 'cpu'") from error
    return chosen


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype meant by `dtype` on that device. Raises InputError."""
    if isinstance(dtype, torch.dtype):
        if dtype in DTYPES.values():
            return dtype
    elif dtype == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if native else torch.float32
    elif dtype in DTYPES:
        return DTYPES[dtype]
    raise InputError(f"dtype {dtype!r} can't be used: give auto, {', '.join(DTYPES)}")


def resolve(name_or_path: str | Path, progress: Progress = silent) -> str:
    """A folder or hub id that `from_pretrained` takes; models of the catalogue are fetched. Raises as `load` does."""
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    if name in CATALOGUE:
        return str(ensure_model(name, progress=progress))
    if path.suffix.lower() == ".gguf":
        return str(ensure_gguf(path, progress=progress))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{name} is a folder without config.json: give the folder of a Hugging Face model")
        return str(path)
    if path.exists():
        raise ModelError(f"{name} is a file: give a .gguf file, a model folder, a hub id, or a catalogue name")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UnknownNameError.of("model", name, CATALOGUE, "or a hub id as org/name, a folder, or a .gguf file")
    return name


def _from_pretrained(
    folder: str, dtype: torch.dtype, options: dict[str, Any]
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    shared = {k: options[k] for k in ("revision", "token", "trust_remote_code", "local_files_only") if k in options}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **shared)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{folder} can't be loaded: {reason}") from error
    return tokenizer, model
