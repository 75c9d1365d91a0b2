"""The pairs that stay, changed so that they stand for those that are gone."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from kvzip.context import RaggedLayer
from kvzip.ops.attention import attend, soft_capped
from kvzip.ops.refit import HELD_OUT, refit
from kvzip.replayed import LayerQueries
from kvzip.transforms.base import BaseTransform, Evicted

BLOCK_LOGITS = 1 << 24  # logits held at a time: 64 MiB of float32


class Refit(BaseTransform):
    """Each kept pair of the context gets a bias of its logit and another value, by least squares on replayed queries.

    Head by head and chunk by chunk, so that what remains of a chunk has the attention mass and puts out the values that
    all of it had (`kvzip.ops.refit`). Some of the queries have no part in the fit and choose its ridge; where they are
    better off without, the pairs stay as they are. The prefix is whole and is not changed.
    """

    summary = "biases and values that make up for what was evicted"
    source = "Attention Matching, arXiv 2602.16284; GRKV, arXiv 2605.31105"
    needs_queries = True
    bias_nbytes = 4

    def apply(self, layer: RaggedLayer, evicted: Evicted) -> RaggedLayer:
        if bool(evicted.keep_mask.all()):
            return layer
        queries = evicted.queries
        assert queries is not None and isinstance(layer.values, Tensor)
        values, bias = layer.values.float().clone(), layer.values.new_zeros(len(layer.values), dtype=torch.float32)
        rows = queries.query.float().reshape(layer.num_kv_heads, -1, *queries.query.shape[1:])
        for head, (start, end) in enumerate(pairwise(layer.offsets)):
            _fit_head(rows[head], queries, evicted, head, values[start:end], bias[start:end])
        if not bool(bias.any()):
            return layer
        return replace(layer, values=values.to(layer.dtype), bias=bias)


def _fit_head(rows: Tensor, queries: LayerQueries, evicted: Evicted, head: int, values: Tensor, bias: Tensor) -> None:
    """Change the values [n, D] and biases [n] of one head in place.  rows: [G, T, D]."""
    all_keys, all_values = evicted.keys[head].float(), evicted.values[head].float()
    keep_mask, outputs, lses = evicted.keep_mask[head], *_attend_all(rows, all_keys, all_values, queries)
    for number, chunk in enumerate(queries.chunks):
        part = slice(evicted.prefix_len + chunk.start, evicted.prefix_len + chunk.stop)
        kept = keep_mask[part]
        if bool(kept.all()) or not bool(kept.any()):
            continue
        shown = _shown(queries.chunk_of, number).to(rows.device)
        logits = soft_capped(rows[:, shown] @ all_keys[part].T * queries.scale, queries.softcap)
        attention = (logits - lses[:, shown].unsqueeze(-1)).exp().flatten(0, 1)
        rest = outputs[:, shown].flatten(0, 1) - attention @ all_values[part]
        is_held_out = (torch.arange(len(shown), device=rows.device) % HELD_OUT == HELD_OUT - 1).repeat(len(rows))
        found = refit(attention, all_values[part], kept, rest, is_held_out)
        if found is not None:
            first = int(keep_mask[: part.start].sum())
            at = slice(first, first + len(found.values))
            values[at], bias[at] = found.values, found.weights.log()


def _attend_all(rows: Tensor, keys: Tensor, values: Tensor, queries: LayerQueries) -> tuple[Tensor, Tensor]:
    """What rows [G, T, D] take from all pairs of a head, [G, T, D], and the log-sum-exps [G, T]; in blocks."""
    step = max(1, BLOCK_LOGITS // (len(rows) * len(keys)))
    found = [
        attend(part[None], keys[None, None], values[None, None], scale=queries.scale, softcap=queries.softcap)
        for part in torch.split(rows, step, dim=1)
    ]
    return torch.cat([out[0] for out, _ in found], dim=1), torch.cat([lse[0] for _, lse in found], dim=1)


def _shown(chunk_of: Tensor, number: int) -> Tensor:
    """Which queries a chunk is fitted to: all that repeat it, and at most as many of the others, evenly spread."""
    own, others = (chunk_of == number).nonzero().squeeze(1), (chunk_of != number).nonzero().squeeze(1)
    if len(others) > len(own):
        others = others[torch.linspace(0, len(others) - 1, len(own)).long()]
    return torch.cat([own, others]).sort().values
