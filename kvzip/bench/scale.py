"""How time and memory grow with the length of a context, up to lengths that only a tiny random Llama reads soon."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvzip.backends import get_backend
from kvzip.bench.measure import peak_over, provenance, summary
from kvzip.compress import Engine, FullContext, RepeatPrompts
from kvzip.hf.geometry import probe
from kvzip.memory import rss_nbytes
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


def bench_scale(context_lens: list[int], keep_ratio: float, replay_scope: str = "auto") -> dict[str, Any]:
    """Seconds and peak memory of reading, replaying and packing, one run a length.

    Returns settings, provenance and one row a length: `prefill_s`, `score_s`, `peak_nbytes` above the loaded model,
    `full_kv_nbytes`.
    """
    engine, options = tiny_engine(), CompressOptions(keep_ratio=keep_ratio, replay_scope=replay_scope)
    FullContext(engine, torch.arange(4), torch.arange(400) % 500).prefill()
    rows = [_row(engine, length, options) for length in context_lens]
    figures = {
        f"{name}_{row['context_len']}": summary([row[name]]) for row in rows for name in ("prefill_s", "score_s")
    }
    return {
        "bench": "scale",
        "model": "tiny Llama, random weights",
        "dtype": "float32",
        "context_len": max(context_lens),
        "keep_ratio": keep_ratio,
        "replay_scope": replay_scope,
        **provenance(engine.model.device),
        "rows": rows,
        "figures": figures,
    }


def _row(engine: Engine, context_len: int, options: CompressOptions) -> dict[str, Any]:
    ids = torch.randint(30, 512, (context_len,), generator=torch.Generator().manual_seed(1))
    peak, seconds = peak_over(rss_nbytes(), lambda: _compress(engine, ids, options))
    nbytes = engine.geometry.kv_nbytes(context_len + 4, engine.model.dtype)
    return {"context_len": context_len, **seconds, "peak_nbytes": peak, "full_kv_nbytes": nbytes}


def _compress(engine: Engine, ids: torch.Tensor, options: CompressOptions) -> dict[str, float]:
    full = FullContext(engine, torch.arange(4), ids)
    full.prefill()
    started = time.perf_counter()
    scores = full.score(local=options.replays_locally(ids.numel()))
    score_s = time.perf_counter() - started
    assert options.keep_ratio is not None
    full.evict(select_global(scores, round(options.keep_ratio * scores.numel())), release=True)
    return {"prefill_s": full.prefill_s, "score_s": score_s}
