"""How time and memory grow with the length of a context, up to lengths that only a tiny random Llama reads soon."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from kvzip.backends import get_backend
from kvzip.bench.measure import WARMUP_LEN, peak_over, provenance, summary
from kvzip.bench.texts import bench_text
from kvzip.chunks import RepeatPrompts
from kvzip.compress import Engine, FullContext
from kvzip.hf.geometry import probe
from kvzip.llm import LLM
from kvzip.memory import release_freed, rss_nbytes
from kvzip.ops.selection import select_global
from kvzip.options import CompressOptions

MAX_POSITIONS = 1 << 20


def tiny_engine() -> Engine:
    """Two layers, two heads on one KV head of 32 dimensions: long contexts in minutes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=MAX_POSITIONS,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    prompts = RepeatPrompts(*(torch.arange(start, start + 8) for start in (1, 9, 17)))
    return Engine(model, probe(model), get_backend("auto"), prompts)


def bench_scale(
    context_lens: list[int], keep_ratio: float, replay_scope: str = "auto", llm: LLM | None = None
) -> dict[str, Any]:
    """Seconds and peak memory of reading, replaying and packing, one run a length.

    llm: a model to read the bundled text with; the tiny one, reading random tokens, where not given.
    Returns settings, provenance and one row a length: `prefill_s`, `score_s`, `peak_nbytes` above the loaded model,
    `full_kv_nbytes`.
    """
    engine = tiny_engine() if llm is None else llm.engine()
    options = CompressOptions(keep_ratio=keep_ratio, replay_scope=replay_scope)
    prefix, ids = _texts(llm, max(context_lens))
    FullContext(engine, prefix, ids[:WARMUP_LEN]).prefill()
    release_freed()
    base = rss_nbytes()
    rows = [_row(engine, prefix, ids[:length], options, base) for length in context_lens]
    names = ("prefill_s", "score_s")
    return {
        "bench": "scale",
        "model": "tiny Llama, random weights" if llm is None else llm.name,
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "context_len": max(context_lens),
        "keep_ratio": keep_ratio,
        "replay_scope": replay_scope,
        **provenance(engine.model.device),
        "rows": rows,
        "figures": {f"{name}_{row['context_len']}": summary([row[name]]) for row in rows for name in names},
    }


def _texts(llm: LLM | None, context_len: int) -> tuple[Tensor, Tensor]:
    """Ids of the prefix and of the longest context."""
    if llm is None:
        gen = torch.Generator().manual_seed(1)
        return torch.arange(4), torch.randint(30, 512, (context_len,), generator=gen)
    return torch.tensor(llm.prefix_ids(), dtype=torch.int64), llm.tokenize(bench_text(llm, context_len))


def _row(engine: Engine, prefix: Tensor, ids: Tensor, options: CompressOptions, base: int) -> dict[str, Any]:
    peak, seconds = peak_over(base, lambda: _compress(engine, prefix, ids, options))
    nbytes = engine.geometry.kv_nbytes(prefix.numel() + ids.numel(), engine.model.dtype)
    return {"context_len": ids.numel(), **seconds, "peak_nbytes": peak, "full_kv_nbytes": nbytes}


def _compress(engine: Engine, prefix: Tensor, ids: Tensor, options: CompressOptions) -> dict[str, float]:
    full = FullContext(engine, prefix, ids)
    chunk_len = full.fit_chunk_len()  # refuse before reading
    full.prefill()
    started = time.perf_counter()
    scores = full.score(chunk_len=chunk_len, local=options.replays_locally(ids.numel()))
    score_s = time.perf_counter() - started
    assert options.ratio is not None
    full.evict(select_global(scores, round(options.ratio * scores.numel())), release=True)
    return {"prefill_s": full.prefill_s, "score_s": score_s}
