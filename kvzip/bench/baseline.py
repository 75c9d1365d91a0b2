"""What a user would otherwise run: transformers' own attention with its own full cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import DynamicCache

from kvzip.llm import LLM


@contextmanager
def plain_attention(llm: LLM) -> Iterator[None]:
    """The model with transformers' `sdpa` (or `eager`, where `sdpa` has no soft cap) while the block runs."""
    ours = llm.model.config._attn_implementation
    capped = any(layer.softcap is not None for layer in llm.geometry.layers)
    llm.model.set_attn_implementation("eager" if capped else "sdpa")
    try:
        yield
    finally:
        llm.model.set_attn_implementation(ours)


@torch.inference_mode()
def plain_prefill(llm: LLM, ids: Tensor) -> DynamicCache:
    """The full cache of `ids` [T], read in one forward pass of the decoder."""
    cache = DynamicCache(config=llm.model.config)
    with plain_attention(llm):
        llm.model.get_decoder()(input_ids=ids.to(llm.model.device)[None], past_key_values=cache, use_cache=True)
    return cache


@torch.inference_mode()
def plain_first_token(llm: LLM, ids: Tensor) -> int:
    """The first greedy token after `ids` [T], everything read anew."""
    with plain_attention(llm):
        out = llm.model(input_ids=ids.to(llm.model.device)[None], use_cache=True, logits_to_keep=1)
    return int(out.logits[0, -1].argmax())
