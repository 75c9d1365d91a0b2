"""The pairs that stay, changed so that they stand for those that are gone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from kvzip.context import RaggedLayer
from kvzip.ops.attention import soft_capped
from kvzip.ops.refit import HELD_OUT, Block, refit
from kvzip.replayed import LayerQueries
from kvzip.transforms.base import BaseTransform, Evicted


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
        for head in range(layer.num_kv_heads):
            for part, block, is_held_out in _blocks(queries, evicted, layer, head):

                def read_back(changed: Tensor, part: slice = part) -> Tensor:
                    return evicted.read_back("values", changed, part)

                found = refit(block, values[part], is_held_out, read_back if evicted.is_rounded else None)
                if found is not None:
                    values[part], bias[part] = found.values, found.weights.log()
        if not bool(bias.any()):
            return layer
        return replace(layer, values=values.to(layer.dtype), bias=bias)


def _blocks(
    queries: LayerQueries, evicted: Evicted, layer: RaggedLayer, head: int
) -> Iterator[tuple[slice, Block, Tensor]]:
    """Of each block of a head: where its pairs stand in the layer, what queries take of them, which are held out.

    Blocks of which nothing is left, or that stay as they were, are skipped.
    """
    groups = len(queries.query) // layer.num_kv_heads
    heads = slice(head * groups, (head + 1) * groups)
    kept_keys = evicted.read_keys(layer, head) if evicted.is_rounded else None
    keep_mask = evicted.keep_mask[head]
    for number, block in enumerate(queries.blocks):
        part = slice(evicted.prefix_len + block.start, evicted.prefix_len + block.stop)
        first, count = int(keep_mask[: part.start].sum()), int(keep_mask[part].sum())
        if not count or (count == part.stop - part.start and not evicted.is_rounded):
            continue
        shown = _shown(queries, number).to(layer.device)
        rows, outputs = (t[heads, shown].float().flatten(0, 1) for t in (queries.query, queries.outputs))
        lse = queries.lse[heads, shown].flatten()
        attention = _attention(rows, evicted.keys[head, part].float(), lse, queries)
        taken = attention @ evicted.values[head, part].float()
        if kept_keys is not None:
            kept = _attention(rows, kept_keys[first : first + count], lse, queries)
        else:
            kept = attention[:, keep_mask[part]]
        is_near = (queries.chunk_of[shown.cpu()] == queries.chunk_of[queries.block_of == number][0]).to(layer.device)
        inside = is_near.repeat(groups).float()  # what the others saw does not hold this block
        is_held_out = (torch.arange(len(shown), device=layer.device) % HELD_OUT == HELD_OUT - 1).repeat(groups)
        start = layer.offsets[head] + first
        mass = attention.sum(dim=1)
        seen = Block(kept, mass, taken, 1 - inside * mass, outputs - inside.unsqueeze(1) * taken)
        yield slice(start, start + count), seen, is_held_out


def _attention(rows: Tensor, keys: Tensor, lse: Tensor, queries: LayerQueries) -> Tensor:
    """The share of each row's attention [R, D], of all that it saw [R], that goes to each key [n, D]: [R, n]."""
    return soft_capped((rows * queries.scale) @ keys.T, queries.softcap).sub_(lse.unsqueeze(1)).exp_()


def _shown(queries: LayerQueries, number: int) -> Tensor:
    """Which queries a block is fitted to: all that repeat it, and half as many of the others, evenly spread."""
    own, others = (found.nonzero().squeeze(1) for found in (queries.block_of == number, queries.block_of != number))
    if len(others) > len(own) // 2:
        others = others[torch.linspace(0, len(others) - 1, len(own) // 2).long()]
    return torch.cat([own, others]).sort().values
