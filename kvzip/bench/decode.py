"""Decoding from a compressed context: the attention alone, and whole tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvzip.bench.baseline import plain_attention
from kvzip.bench.measure import paired, ratios, report, timed
from kvzip.bench.synthetic import in_codes, random_context, random_full_cache
from kvzip.compressed import CompressedContext
from kvzip.context import RaggedContext, RaggedLayer
from kvzip.hf.cache import SessionCache
from kvzip.llm import LLM
from kvzip.recipes import MIXED

CODES = f"quantize:key_bits=4,value_bits=4,{MIXED}"  # with biases, as `kvzip:small` stores pairs
NUM_TOKENS = 8  # decoded at a time
ANSWER_TOKENS = 32  # of each question
QUESTIONS = ["What is this text about?", "Who is named first?", "Where does it end?", "Which year is it?"]


def bench_decode(llm: LLM, context_len: int, keep_ratio: float, num_runs: int = 5) -> dict[str, Any]:
    """Attention and whole tokens over caches of random numbers, against transformers' `sdpa` over its full cache.

    Figures: seconds a token of attention over all full-attention layers (`full_attention_s`, `attention_s` at
    `keep_ratio`, `attention_all_s` at keep ratio 1, `coded_attention_s` at `keep_ratio` from the codes of `CODES`), the
    bytes a second that ours reads, seconds a token of the whole model (full cache, ours, ours from codes, and an empty
    cache: the floor), seconds of four questions one by one and at once; ratios.
    """
    context, everything = random_context(llm, context_len, keep_ratio), random_context(llm, context_len, 1.0)
    full, coded = random_full_cache(llm, context_len), in_codes(context, CODES)
    samples = paired(num_runs, _attention(llm, context, everything, coded, full))
    del everything
    samples |= paired(num_runs, _tokens(llm, context, coded, full))
    del full
    samples |= paired(num_runs, _questions(context))
    nbytes = sum(context.data.layers[i].nbytes for i in context.data.full_layers)
    figures = {
        **samples,
        "attention_bytes_per_s": [nbytes / s for s in samples["attention_s"]],
        "full_over_attention": ratios(samples["full_attention_s"], samples["attention_s"]),
        "full_over_attention_all": ratios(samples["full_attention_s"], samples["attention_all_s"]),
        "full_over_token": ratios(samples["full_token_s"], samples["token_s"]),
        "attention_over_coded": ratios(samples["attention_s"], samples["coded_attention_s"]),
        "token_over_coded": ratios(samples["token_s"], samples["coded_token_s"]),
        "token_over_empty": ratios(samples["token_s"], samples["empty_token_s"]),
        "alone_over_batch": ratios(samples["alone_s"], samples["batch_s"]),
    }
    sizes = {
        "kv_nbytes": context.data.kv_nbytes,
        "coded_kv_nbytes": coded.data.kv_nbytes,
        "full_kv_nbytes": context.data.info.full_kv_nbytes,
    }
    return report(
        "decode",
        llm,
        context_len,
        keep_ratio,
        None,
        figures,
        **sizes,
        backend=type(llm.backend).__name__.removesuffix("Backend").lower(),
    )


def _attention(
    llm: LLM, context: CompressedContext, everything: CompressedContext, coded: CompressedContext, full: DynamicCache
) -> dict[str, Callable[[], float]]:
    """One token's attention over all full-attention layers."""
    layers = [llm.geometry.layers[i] for i in llm.geometry.full_layers]
    gen = torch.Generator().manual_seed(3)
    queries = [
        torch.randn(1, layer.num_heads, 1, layer.head_dim, generator=gen).to(llm.model.device, llm.model.dtype)
        for layer in layers
    ]
    groups = SimpleNamespace(num_key_value_groups=layers[0].num_heads // layers[0].num_kv_heads, is_causal=True)

    def plain() -> None:
        for query, index in zip(queries, llm.geometry.full_layers, strict=True):
            dense = full.layers[index]
            sdpa_attention_forward(groups, query, dense.keys, dense.values, None, scaling=layers[0].scale)

    def ours(layers_: list[RaggedLayer]) -> None:
        for query, layer in zip(queries, layers_, strict=True):
            llm.backend.attend_ragged(query, layer, scale=layers[0].scale)

    def work(run: Callable[[], None]) -> Callable[[], float]:
        return torch.inference_mode()(lambda: timed(run, llm.model.device)[0])

    kept, whole, codes = ([c.data.layers[i] for i in c.data.full_layers] for c in (context, everything, coded))
    return {
        "full_attention_s": work(plain),
        "attention_s": work(lambda: ours(kept)),
        "attention_all_s": work(lambda: ours(whole)),
        "coded_attention_s": work(lambda: ours(codes)),
    }


def _tokens(
    llm: LLM, context: CompressedContext, coded: CompressedContext, full: DynamicCache
) -> dict[str, Callable[[], float]]:
    """Seconds a token of the whole model, a step of `NUM_TOKENS` greedy tokens."""
    context_len = context.data.context_len

    @torch.inference_mode()
    def decode(cache: Any, start: int) -> None:
        token = torch.zeros(1, 1, dtype=torch.int64, device=llm.model.device)
        for step in range(NUM_TOKENS):
            position = torch.tensor([[start + step]], device=llm.model.device)
            logits: Tensor = llm.model(input_ids=token, position_ids=position, past_key_values=cache).logits
            token = logits[:, -1:].argmax(-1)

    def with_full() -> float:
        cache = copy.copy(full)  # shallow: decoding makes new tensors and leaves these as they are
        cache.layers = [copy.copy(layer) for layer in full.layers]
        with plain_attention(llm):
            return timed(lambda: decode(cache, context_len), llm.model.device)[0] / NUM_TOKENS

    def with_empty() -> float:
        with plain_attention(llm):
            cache = DynamicCache(config=llm.model.config)
            return timed(lambda: decode(cache, 0), llm.model.device)[0] / NUM_TOKENS

    def ours(data: RaggedContext) -> float:
        cache = SessionCache(data, llm.backend)
        return timed(lambda: decode(cache, 0), llm.model.device)[0] / NUM_TOKENS

    return {
        "full_token_s": with_full,
        "token_s": lambda: ours(context.data),
        "coded_token_s": lambda: ours(coded.data),
        "empty_token_s": with_empty,
    }


def _questions(context: CompressedContext) -> dict[str, Callable[[], float]]:
    """Four questions with `ANSWER_TOKENS` tokens of answer each: one after another, and as one batch."""
    options: dict[str, Any] = {"max_new_tokens": ANSWER_TOKENS, "eos_token_id": None}
    device = context.llm.model.device

    def alone() -> None:
        for question in QUESTIONS:
            context.ask(question, **options)

    return {
        "alone_s": lambda: timed(alone, device)[0],
        "batch_s": lambda: timed(lambda: context.ask_many(QUESTIONS, **options), device)[0],
    }
