"""The identity of a model and its tokenizer: what must agree before a saved context may be used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Keys of a config that say where or how it was loaded, not what the model computes.
VOLATILE_KEYS = {
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "attn_implementation", "_attn_implementation",
    "architectures", "use_cache", "output_attentions", "output_hidden_states", "return_dict", "experts_implementation",
}  # fmt: skip
SAMPLES_PER_TENSOR = 64


def fingerprint(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, weights: Iterable[tuple[str, Tensor]] | None = None
) -> str:
    """`architecture:digest`, the same in every process, dtype and folder.

    weights: the parameters with their names, in the model's order, where the model itself does not hold them.

    The digest is over the config, the tokenizer's vocabulary and template, and a sample of every weight, so that a
    fine-tuned model is not taken for its base.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps(_stable(model.config.to_dict()), sort_keys=True, default=str).encode())
    digest.update(_tokenizer_digest(tokenizer))
    digest.update(_weights_digest(model.named_parameters() if weights is None else weights))
    return f"{type(model).__name__}:{digest.hexdigest()[:24]}"


def _stable(value: object) -> object:
    if isinstance(value, dict):
        return {k: _stable(v) for k, v in value.items() if k not in VOLATILE_KEYS and v is not None}
    return value


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> bytes:
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    probe = tokenizer(
        "The KV cache, 2025: \u00e9\u4e2d\U0001f600\n\tif x != 'y':  pass", add_special_tokens=False
    ).input_ids
    content = json.dumps([vocabulary, probe, str(tokenizer.chat_template)])
    return hashlib.sha256(content.encode()).digest()


@torch.inference_mode()
def _weights_digest(weights: Iterable[tuple[str, Tensor]]) -> bytes:
    """A digest of evenly spaced weights, rounded to bfloat16 so that the dtype a model is loaded in does not matter."""
    digest = hashlib.sha256()
    for name, weight in weights:
        flat = weight.detach().flatten()
        picked = flat[:: max(1, flat.numel() // SAMPLES_PER_TENSOR)].to(torch.bfloat16).view(torch.int16).cpu()
        digest.update(name.encode() + picked.numpy().tobytes())
    return digest.digest()
