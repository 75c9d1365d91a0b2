"""The pairs that stay, changed so that they stand for those that are gone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvzip.context import RaggedLayer
from kvzip.ops.attention import soft_capped
from kvzip.ops.refit import HELD_OUT, Block, refit, with_mass
from kvzip.replayed import LayerQueries
from kvzip.transforms.base import BaseTransform, Evicted

OTHERS = 2  # of queries that repeat a block, one of those that don't is taken for so many


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
    bias_nbytes = 2

    def apply(self, layer: RaggedLayer, evicted: Evicted) -> RaggedLayer:
        if bool(evicted.keep_mask.all()) and not evicted.is_rounded:
            return layer
        queries = evicted.queries
        assert queries is not None and isinstance(layer.values, Tensor)
        values, bias = layer.values.float().clone(), layer.values.new_zeros(len(layer.values), dtype=torch.float32)
        for part, fitted, judge in _blocks(queries, evicted, layer):

            def read_back(changed: Tensor, part: slice = part) -> Tensor:
                return evicted.read_back("values", changed, part)

            found = refit(fitted, judge, values[part], read_back if evicted.is_rounded else None)
            if found is not None:
                values[part], bias[part] = found.values, found.weights.log()
        if not bool(bias.any()):
            return layer
        return replace(layer, values=values.to(layer.dtype), bias=bias.half())


@dataclass(frozen=True)
class Shown:
    """The queries that a block of a layer is fitted to, the held-out ones last; R rows a KV head.

    query: [Hkv, R, D], scaled.  lse: [Hkv, R].  seen: [Hkv, R, D + 1], what each put out over all that it saw, and a
    mass of 1.  is_near: [R] 1 or 0, whether that held the block.  num_fitted: rows that are not held out.
    """

    query: Tensor
    lse: Tensor
    seen: Tensor
    is_near: Tensor
    num_fitted: int

    def block(self, head: int, attention: Tensor, values: Tensor, kept: Tensor) -> tuple[Block, Block]:
        """The block as queries see it that are fitted to, and as the held-out ones do.

        attention: [R, m] to all its pairs, values: [m, D] of these.  kept: [R, n] to those that stay.
        """
        took = attention @ with_mass(values)
        whole = Block(kept, took, self.seen[head] - self.is_near.unsqueeze(1) * took)
        return whole.part(slice(self.num_fitted)), whole.part(slice(self.num_fitted, None))


def _blocks(queries: LayerQueries, evicted: Evicted, layer: RaggedLayer) -> Iterator[tuple[slice, Block, Block]]:
    """Of each block of each head: where its pairs stand in the layer, what the queries take of them.

    Blocks of which nothing is left, or that stay as they were, are skipped.
    """
    heads = range(layer.num_kv_heads)
    stored = [evicted.read_keys(layer, head) for head in heads] if evicted.is_rounded else None
    for number, block in enumerate(queries.blocks):
        part = slice(evicted.prefix_len + block.start, evicted.prefix_len + block.stop)
        mask = evicted.keep_mask[:, part]
        firsts, counts = evicted.keep_mask[:, : part.start].sum(1).tolist(), mask.sum(1).tolist()
        shown = _shown(queries, number, layer)
        for head, first, count in zip(heads, firsts, counts, strict=True):
            if not count or (count == mask.shape[1] and stored is None):
                continue
            order = torch.cat([mask[head].nonzero(), (~mask[head]).nonzero()]).squeeze(1)  # what stays comes first
            keys, values = (pairs[head, part][order].float() for pairs in (evicted.keys, evicted.values))
            attention = _attention(shown, head, keys, queries.softcap)
            kept = attention[:, :count]
            if stored is not None:
                kept = _attention(shown, head, stored[head][first : first + count], queries.softcap)
            start = layer.offsets[head] + first
            yield slice(start, start + count), *shown.block(head, attention, values, kept)


def _attention(shown: Shown, head: int, keys: Tensor, softcap: float | None) -> Tensor:
    """The share of each query's attention, of all that it saw, that goes to each key [n, D] of a head: [R, n]."""
    return soft_capped(shown.query[head] @ keys.T, softcap).sub_(shown.lse[head].unsqueeze(1)).exp_()


def _shown(queries: LayerQueries, number: int, layer: RaggedLayer) -> Shown:
    """The queries that a block is fitted to: all that repeat it, and a share of that of the others, evenly spread."""
    own, others = (found.nonzero().squeeze(1) for found in (queries.block_of == number, queries.block_of != number))
    if len(others) > len(own) // OTHERS:
        others = others[torch.linspace(0, len(others) - 1, len(own) // OTHERS).long()]
    chosen = torch.cat([own, others]).sort().values
    is_held_out = torch.arange(len(chosen)) % HELD_OUT == HELD_OUT - 1
    chosen = torch.cat([chosen[~is_held_out], chosen[is_held_out]])
    is_near = queries.chunk_of[chosen] == queries.chunk_of[own[0]]
    groups = len(queries.query) // layer.num_kv_heads

    def rows(tensor: Tensor) -> Tensor:
        """[Hq, T, ...] as float32 [Hkv, R, ...], the query heads of a token beside one another."""
        found = tensor[:, chosen.to(tensor.device)].float()
        return found.reshape(-1, groups, *found.shape[1:]).transpose(1, 2).flatten(1, 2)

    return Shown(
        query=rows(queries.query).mul_(queries.scale),
        lse=rows(queries.lse),
        seen=with_mass(rows(queries.outputs)),
        is_near=is_near.repeat_interleave(groups).float().to(layer.device),
        num_fitted=int((~is_held_out).sum()) * groups,
    )
