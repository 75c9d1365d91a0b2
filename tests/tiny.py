"""Random-weight models of a few families, small enough for tests of shapes and equalities."""

from __future__ import annotations

import torch
from tokenizers import AddedToken, Tokenizer, models
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,  # larger than usual, so that attention is far from uniform
}
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
    "original_max_position_embeddings": 1024, "rope_theta": 500000.0,
}  # fmt: skip
GEMMA = SMALL | {"head_dim": 16, "query_pre_attn_scalar": 32, "sliding_window": 24, "num_hidden_layers": 4}
LAYERS = ["sliding_attention", "full_attention"] * 2

CONFIGS = {
    "llama": lambda: LlamaConfig(**SMALL),
    "llama3.1": lambda: LlamaConfig(**SMALL, rope_parameters=LLAMA3_ROPE),
    "qwen2": lambda: Qwen2Config(**SMALL),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=16),
    "mistral": lambda: MistralConfig(**SMALL, sliding_window=None),
    "phi3": lambda: Phi3Config(**SMALL),
    "gemma2": lambda: Gemma2Config(**GEMMA, layer_types=LAYERS, attn_logit_softcapping=5.0),
    "gemma3": lambda: Gemma3TextConfig(**GEMMA, layer_types=LAYERS),
}


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A model of that family with random weights, float32, on the CPU."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=torch.float32).eval()


def llama(num_layers: int = 5) -> PreTrainedModel:
    """A Llama of that many layers, otherwise as `tiny_model` makes it."""
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL | {"num_hidden_layers": num_layers})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)


def tiny_tokenizer(chat_template: str | None = CHATML, bos: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with ChatML's special tokens; ids fit the tiny models."""
    backend = Tokenizer(models.BPE(vocab={c: i + 8 for i, c in enumerate(sorted(ByteLevel.alphabet()))}, merges=[]))
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    specials = ["<pad>", "<s>", "<|im_end|>", "<|im_start|>"]
    backend.add_special_tokens([AddedToken(t, special=True) for t in specials])
    if bos:
        backend.post_processor = TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", backend.token_to_id("<s>"))])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        chat_template=chat_template,
    )
