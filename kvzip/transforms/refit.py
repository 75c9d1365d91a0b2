"""The pairs that stay, changed so that they stand for those that are gone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from kvzip.context import RaggedLayer
from kvzip.ops.attention import attend, soft_capped
from kvzip.ops.refit import HELD_OUT, Block, refit
from kvzip.replayed import LayerQueries
from kvzip.transforms.base import BaseTransform, Evicted

BLOCK_LOGITS = 1 << 24  # logits held at a time: 64 MiB of float32


class Refit(BaseTransform):
    """Each kept pair of the context gets a bias of its logit and another value, by least squares on replayed queries.

    Head by head and block by block, so that what remains of a block has the attention mass and puts out the values that
    all of it had (`kvzip.ops.refit`). Some of the queries have no part in the fit and choose its ridge; where they are
    better off without, the pairs stay as they are. The prefix is whole and is not changed. Where pairs become codes
    afterwards, the fit is made with the keys as they will be read, and chosen by the values as they will be.
    """

    summary = "biases and values that make up for what was evicted"
    source = "Attention Matching, arXiv 2602.16284; GRKV, arXiv 2605.31105"
    needs_queries = True
    bias_nbytes = 4

    def apply(self, layer: RaggedLayer, evicted: Evicted) -> RaggedLayer:
        if bool(evicted.keep_mask.all()) and not evicted.is_rounded:
            return layer
        queries = evicted.queries
        assert queries is not None and isinstance(layer.values, Tensor)
        values, bias = layer.values.float().clone(), layer.values.new_zeros(len(layer.values), dtype=torch.float32)
        rows = queries.query.float().reshape(layer.num_kv_heads, -1, *queries.query.shape[1:])
        for head in range(layer.num_kv_heads):
            for part, block, is_held_out in _blocks(rows[head], queries, evicted, layer, head):

                def read_back(changed: Tensor, part: slice = part) -> Tensor:
                    return evicted.read_back("values", changed, part)

                found = refit(block, values[part], is_held_out, read_back if evicted.is_rounded else None)
                if found is not None:
                    values[part], bias[part] = found.values, found.weights.log()
        if not bool(bias.any()):
            return layer
        return replace(layer, values=values.to(layer.dtype), bias=bias)


def _blocks(
    rows: Tensor, queries: LayerQueries, evicted: Evicted, layer: RaggedLayer, head: int
) -> Iterator[tuple[slice, Block, Tensor]]:
    """Of each block of a head: where its pairs stand in the layer, what queries take of them, which are held out.

    rows: [G, T, D], the queries.  Blocks of which nothing is left, or that stay as they were, are skipped.
    """
    all_keys, all_values = evicted.keys[head].float(), evicted.values[head].float()
    kept_keys, keep_mask = evicted.read_keys(layer, head), evicted.keep_mask[head]
    outputs, lses = _attend_all(rows, all_keys, all_values, queries)
    for number, block in enumerate(queries.blocks):
        part = slice(evicted.prefix_len + block.start, evicted.prefix_len + block.stop)
        first, count = int(keep_mask[: part.start].sum()), int(keep_mask[part].sum())
        if not count or (count == part.stop - part.start and not evicted.is_rounded):
            continue
        shown = _shown(queries.block_of, number).to(rows.device)
        asking, total = rows[:, shown].flatten(0, 1), lses[:, shown].flatten()
        attention = _attention(asking, all_keys[part], total, queries)
        taken = attention @ all_values[part]
        kept = _attention(asking, kept_keys[first : first + count], total, queries)
        seen = Block(kept, attention.sum(dim=1), taken, outputs[:, shown].flatten(0, 1) - taken)
        is_held_out = (torch.arange(len(shown), device=rows.device) % HELD_OUT == HELD_OUT - 1).repeat(len(rows))
        start = layer.offsets[head] + first
        yield slice(start, start + count), seen, is_held_out


def _attention(rows: Tensor, keys: Tensor, lses: Tensor, queries: LayerQueries) -> Tensor:
    """The share of each row's attention [R, D], of all that it saw [R], that goes to each key [n, D]: [R, n]."""
    return (soft_capped(rows @ keys.T * queries.scale, queries.softcap) - lses.unsqueeze(1)).exp()


def _attend_all(rows: Tensor, keys: Tensor, values: Tensor, queries: LayerQueries) -> tuple[Tensor, Tensor]:
    """What rows [G, T, D] take from all pairs of a head, [G, T, D], and the log-sum-exps [G, T]; in blocks."""
    step = max(1, BLOCK_LOGITS // (len(rows) * len(keys)))
    found = [
        attend(part[None], keys[None, None], values[None, None], scale=queries.scale, softcap=queries.softcap)
        for part in torch.split(rows, step, dim=1)
    ]
    return torch.cat([out[0] for out, _ in found], dim=1), torch.cat([lse[0] for _, lse in found], dim=1)


def _shown(block_of: Tensor, number: int) -> Tensor:
    """Which queries a block is fitted to: all that repeat it, and at most as many of the others, evenly spread."""
    own, others = (block_of == number).nonzero().squeeze(1), (block_of != number).nonzero().squeeze(1)
    if len(others) > len(own):
        others = others[torch.linspace(0, len(others) - 1, len(own)).long()]
    return torch.cat([own, others]).sort().values
