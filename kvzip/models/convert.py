"""A GGUF file as a Hugging Face folder in float32, which loads in seconds.

float32 because that is what the blocks dequantize to, and because a CPU without native bfloat16 is hundreds
of times slower in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvzip.errors import ModelError
from kvzip.progress import Progress, silent

if TYPE_CHECKING:
    from torch import Tensor

    from kvzip.models.gguf_reader import HeaderReader

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "starcoder2")
ROPE_FACTORS = "rope_freqs.weight"


def convert_gguf(gguf: Path, target: Path, *, progress: Progress | None = None) -> None:
    """Write the model and the tokenizer of a GGUF file to the folder `target` (made if missing).

    The folder holds model.safetensors (float32), config.json, generation_config.json and the tokenizer, with
    its chat template where the file has one. progress: in tensors.
    Raises InputError for a file that is no whole GGUF file, and ModelError for an architecture that can't be
    converted or weights that do not fit it.
    """
    from kvzip.models.gguf_reader import metadata, open_gguf

    report = progress or silent
    reader = open_gguf(gguf)
    meta = metadata(reader)
    report("converting", 0, len(reader.tensors))
    raw = read_config(reader, meta)
    target.mkdir(parents=True, exist_ok=True)
    vocabulary = save_tokenizer(gguf, meta, raw["vocab_size"], target)
    save_model(reader, raw, target, report)
    save_generation_config(meta, vocabulary, target)


def read_config(reader: HeaderReader, meta: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of the model's configuration. Raises ModelError for an unknown architecture."""
    from transformers.integrations import GGUF_CONFIG_MAPPING

    from kvzip.models.gguf_config import repair_config

    arch = meta.get("general.architecture")
    if arch not in ARCHITECTURES or meta.get("split.count", 1) > 1:
        kind = f"of architecture {arch!r}" if arch not in ARCHITECTURES else "that is split into several"
        known = ", ".join(ARCHITECTURES)
        raise ModelError(f"can't convert a GGUF file {kind} (can: {known}): use the Hugging Face folder")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _renamed(meta, f"{arch}.", GGUF_CONFIG_MAPPING[arch])
    config |= _renamed(meta, "tokenizer.", GGUF_CONFIG_MAPPING["tokenizer"])
    config["model_type"] = "gemma3_text" if arch == "gemma3" else arch  # a GGUF file holds the text model only
    config["vocab_size"] = int(tensors["token_embd.weight"].shape[-1])
    config["tie_word_embeddings"] = "output.weight" not in tensors
    return repair_config(config, meta, tensors[ROPE_FACTORS].data if ROPE_FACTORS in tensors else None)


def _renamed(meta: Mapping[str, Any], prefix: str, names: Mapping[str, str | None]) -> dict[str, Any]:
    """The fields of `meta` under `prefix` that `names` has a new name for."""
    return {new: meta[prefix + old] for old, new in names.items() if new and prefix + old in meta}


def save_tokenizer(gguf: Path, meta: Mapping[str, Any], vocab_size: int, target: Path) -> dict[str, int]:
    """Write tokenizer.json and its configuration; returns the vocabulary, of at most `vocab_size` tokens.

    The generic tokenizer class is taken on purpose: it is loaded again just as it is in the file, where the
    class of a model family would build its own normalizer and splitter anew.
    """
    from transformers import PreTrainedTokenizerFast

    from kvzip.models.gguf_config import repair_tokenizer

    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    repair_tokenizer(tokenizer.backend_tokenizer, meta)
    tokenizer.save_pretrained(str(target))
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    if len(vocabulary) > vocab_size:
        _drop_tokens_from(vocab_size, target / "tokenizer.json")
    return {token: index for token, index in vocabulary.items() if index < vocab_size}


def _drop_tokens_from(vocab_size: int, path: Path) -> None:
    """Drop the added tokens that the model has no row for.

    transformers builds a byte-level vocabulary by way of the GPT-2 tokenizer, which adds its own <|endoftext|>
    to one that has none; a text with those letters would then crash the model.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < vocab_size]
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def save_model(reader: HeaderReader, raw: dict[str, Any], target: Path, report: Progress) -> None:
    """Write config.json and model.safetensors."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**raw)
    with torch.device("meta"):  # only the names and the shapes of the weights are needed
        model = AutoModelForCausalLM.from_config(config)
    weights = read_weights(reader, model, raw, report)
    check_weights(weights, model)
    config.architectures = [type(model).__name__]
    config.dtype = torch.float32
    config.save_pretrained(target)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def read_weights(reader: HeaderReader, model: Any, raw: dict[str, Any], report: Progress) -> dict[str, Tensor]:
    """The weights by their Hugging Face names, dequantized to float32.

    Goes through the tensor processors of transformers (they undo llama.cpp's permutation of rotary rows and
    its shift of norms); `from_pretrained(gguf_file=...)` does the same but needs the accelerate package.
    Raises ModelError for a tensor that the model has no place for.
    """
    import numpy as np
    import torch
    from gguf import dequantize
    from transformers import modeling_gguf_pytorch_utils as loader

    arch = reader.fields["general.architecture"].contents()
    processor = loader.TENSOR_PROCESSORS.get(arch, loader.TensorProcessor)(config=raw)
    names = loader.get_gguf_hf_weights_map(model, processor)
    weights: dict[str, Tensor] = {}
    for done, tensor in enumerate(reader.tensors, start=1):
        if tensor.name == ROPE_FACTORS:  # went into the configuration
            continue
        if tensor.name not in names:
            raise ModelError(f"tensor {tensor.name!r} of the GGUF file has no place in a {arch} model")
        processed = processor.process(dequantize(tensor.data, tensor.tensor_type), tensor.name)
        weights[names[tensor.name]] = torch.from_numpy(np.array(processed.weights, dtype=np.float32, order="C"))
        report("converting", done, len(reader.tensors))
    return weights


def check_weights(weights: Mapping[str, Tensor], model: Any) -> None:
    """Raise ModelError unless `weights` are exactly the untied weights of `model`, shape by shape."""
    tied = model._tied_weights_keys if model.config.tie_word_embeddings else ()
    expected = {name: tensor.shape for name, tensor in model.state_dict().items() if name not in tied}
    found = {name: tensor.shape for name, tensor in weights.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise ModelError(f"the GGUF file does not hold the weights of a {model.config.model_type} model: {wrong[0]}")


def save_generation_config(meta: Mapping[str, Any], vocabulary: Mapping[str, int], target: Path) -> None:
    """Write generation_config.json: greedy, and stopping at every end token of the vocabulary."""
    from transformers import GenerationConfig

    from kvzip.models.gguf_config import end_token_ids

    eos = end_token_ids(meta.get("tokenizer.ggml.eos_token_id"), vocabulary)
    GenerationConfig(
        bos_token_id=meta.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=eos,
        pad_token_id=meta.get("tokenizer.ggml.padding_token_id", eos[0] if eos else None),
        do_sample=False,
    ).save_pretrained(str(target))
