"""A stand-in for an engine that serves portable files: a stock transformers cache, one slot a token for all heads."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

import kvzip
from kvzip.compress import pack_context
from kvzip.context import RaggedContext
from kvzip.hf.cache import SessionCache
from kvzip.ops.rope import shift_keys
from kvzip.portable import PortableContext, count_for, uniform_mask
from kvzip.prefilled import Prefilled
from kvzip.selecting import Selection


def loaded(llm: kvzip.LLM, context: PortableContext, offset: int = 0) -> DynamicCache:
    """The slots of all layers in the model's own kind of cache, as they are.  offset: of keys that stand elsewhere."""
    cache = DynamicCache(config=llm.model.config)
    for index, geometry in enumerate(llm.geometry.layers):
        keys, values = context.slots(index, 0, context.num_pairs)
        keys = shift_keys(keys, geometry.inv_freq, offset)
        cache.update(keys.transpose(0, 1)[None], values.transpose(0, 1)[None], index)
    return cache


@torch.inference_mode()
def engine_logits(llm: kvzip.LLM, context: PortableContext, asked: Tensor, offset: int = 0) -> Tensor:
    """[T, V] logits of tokens [T] behind the slots; the first stands at position M."""
    positions = torch.arange(context.num_pairs, context.num_pairs + len(asked))[None]
    return llm.model(asked[None], past_key_values=loaded(llm, context, offset), position_ids=positions).logits[0]


@torch.inference_mode()
def greedy(llm: kvzip.LLM, context: PortableContext, asked: Tensor, num_new: int) -> list[int]:
    """Token by token, by nothing but the model's own forward."""
    cache, new, first = loaded(llm, context), list[int](), context.num_pairs
    while len(new) < num_new:
        positions = torch.arange(first, first + len(asked))[None]
        logits = llm.model(asked[None], past_key_values=cache, position_ids=positions, logits_to_keep=1).logits
        new.append(int(logits[0, -1].argmax()))
        first, asked = first + len(asked), torch.tensor(new[-1:])
    return new


@torch.inference_mode()
def session_logits(llm: kvzip.LLM, data: RaggedContext, asked: Tensor) -> Tensor:
    """[T, V] logits of tokens [T] behind a compressed context."""
    return llm.model(asked[None], past_key_values=SessionCache(data, llm.backend)).logits[0]


def same_pairs(prefilled: Prefilled, context: RaggedContext, keep_ratio: float | None = None) -> RaggedContext:
    """A compressed context of the pairs that an export keeps, packed straight from the full cache of the text."""
    mask = uniform_mask(context, count_for(context, keep_ratio))
    return pack_context(prefilled._full, Selection(mask, None), context.info, release=False)
