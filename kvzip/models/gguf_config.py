"""What transformers leaves out when it reads a configuration or a tokenizer from a GGUF file.

transformers maps the common keys and lets every other field fall back to the default of the configuration
class, which is the value of one particular checkpoint. Each function here repairs one such field from the
metadata of the file, or refuses the file where it can't. `meta` maps GGUF keys to values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from tokenizers import normalizers, pre_tokenizers

from kvzip.errors import ModelError

Meta = Mapping[str, Any]

# llama.cpp splits single digits off before anything else for these vocabularies; transformers does not know
# their names and leaves the split of GPT-2, so "a  1" becomes other tokens than the model was trained on.
DIGIT_SPLIT_VOCABULARIES = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}

# The tokenizer of Qwen normalizes to NFC; a GGUF file does not say so and the loader clears the normalizer.
NFC_VOCABULARIES = {"qwen2", "deepseek-r1-qwen"}

# Tokens that end a turn or a text. llama.cpp stops at each of them that a vocabulary has; a GGUF names only one.
END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>", "<eos>")

# Gemma of 27B scales its attention by hidden size / heads, all smaller ones by the head size (as llama.cpp does).
GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}


def repair_config(config: dict[str, Any], meta: Meta, rope_factors: np.ndarray | None) -> dict[str, Any]:
    """`config` as transformers read it from a GGUF file, with the fields it left at defaults filled in.

    rope_factors: the `rope_freqs.weight` tensor of the file, [head_dim / 2], or None.
    Raises ModelError for a rotary scaling that can't be expressed.
    """
    arch = meta["general.architecture"]
    fixed = {key: value for key, value in config.items() if key not in ("_model_name_or_path", "unk_token_id")}
    # The file stores float32: 9.999999747378752e-06 is 1e-05, as in the official configuration.
    fixed.update({key: _shortest(value) for key, value in fixed.items() if isinstance(value, float)})
    if f"{arch}.attention.sliding_window" in meta:
        fixed["sliding_window"] = meta[f"{arch}.attention.sliding_window"]
    if f"{arch}.attention.key_length" in meta and arch != "gemma4":  # there it is the size of the full layers
        fixed["head_dim"] = meta[f"{arch}.attention.key_length"]
    if arch in GEMMA_27B_LAYERS:
        fixed["query_pre_attn_scalar"] = _gemma_attention_scalar(fixed, arch)
    scaling = _rope_scaling(fixed, meta, rope_factors)
    return fixed | ({"rope_scaling": scaling} if scaling else {})


def repair_tokenizer(backend: Any, meta: Meta) -> None:
    """Give a `tokenizers.Tokenizer` the digit split and the normalizer that the vocabulary was made with."""
    vocabulary = meta.get("tokenizer.ggml.pre")
    if vocabulary in DIGIT_SPLIT_VOCABULARIES:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if vocabulary in NFC_VOCABULARIES:
        backend.normalizer = normalizers.NFC()


def end_token_ids(eos_token_id: int | None, vocabulary: Mapping[str, int]) -> list[int]:
    """Ids at which generation stops: the one the file names first, then every other end token it has."""
    ids = [eos_token_id] if eos_token_id is not None else []
    others = [vocabulary[token] for token in END_TOKENS if token in vocabulary]
    return list(dict.fromkeys(ids + others))


def _shortest(value: float) -> float:
    return float(str(np.float32(value)))


def _gemma_attention_scalar(config: Mapping[str, Any], arch: str) -> int:
    if config["num_hidden_layers"] == GEMMA_27B_LAYERS[arch]:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config["head_dim"])


def _rope_scaling(config: Mapping[str, Any], meta: Meta, factors: np.ndarray | None) -> dict[str, Any] | None:
    """The `rope_scaling` entry; transformers reads neither the keys nor the tensor that hold it."""
    arch = meta["general.architecture"]
    kind = meta.get(f"{arch}.rope.scaling.type", "none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": float(meta[f"{arch}.rope.scaling.factor"])}
    if kind != "none":
        raise ModelError(f"rotary scaling {kind!r} of a GGUF file is not supported: use the Hugging Face folder")
    return _llama3_scaling(config, factors) if factors is not None else None


def _llama3_scaling(config: Mapping[str, Any], factors: np.ndarray) -> dict[str, Any]:
    """The Llama 3 scaling that a `rope_freqs.weight` tensor was computed from; only its factor varies."""
    factor = float(factors.max())
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    expected = llama3_factors(config["rope_theta"], head_dim, factor)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise ModelError("the rope_freqs tensor of this GGUF file is not of Llama 3: use the Hugging Face folder")
    return scaling


def llama3_factors(theta: float, head_dim: int, factor: float) -> np.ndarray:
    """What Llama 3 divides each rotary frequency by, [head_dim / 2]: 1 for short waves, `factor` for long ones."""
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    smooth = np.clip((8192 / wavelength - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    return np.asarray(1.0 / ((1 - smooth) / factor + smooth))
