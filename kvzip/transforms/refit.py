"""The pairs that stay, changed so that they stand for those that are gone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvzip.context import RaggedLayer
from kvzip.ops.attention import soft_capped
from kvzip.ops.pursuit import principal, pursue
from kvzip.ops.refit import HELD_OUT, RIDGES, Block, Moments, refit, with_mass
from kvzip.replayed import LayerQueries
from kvzip.transforms.base import BaseTransform, Evicted

SYSTEMS = 16  # blocks of heads that are pursued at a time
OTHERS = 2  # of queries that repeat a block, one of those that don't is taken for so many
MOST = 0.75  # of a block's pairs: where more stay, the pursuit has little to choose
CANDIDATES = 1.5  # times as many pairs as stay are looked at by the pursuit
THINNED = 2  # of so many tokens whose queries are fitted to, the pursuit is shown those of one


class Refit(BaseTransform):
    """Each kept pair of the context gets a bias of its logit and another value, by least squares on replayed queries.

    Head by head and block by block, so that what remains of a block has the attention mass and puts out the values that
    all of it had (`kvzip.ops.refit`). Some of the queries have no part in the fit and choose its ridge; where they are
    better off without, the pairs stay as they are. The prefix is whole and is not changed. Where pairs become codes
    afterwards, the fit is made with the keys as they will be read, and chosen by the values as they will be.
    keys: which pairs of a block of a head stay; "scored", those of the method, or "pursued", as many by orthogonal
    matching pursuit on the block's mass and outputs (`kvzip.ops.pursuit`) where the held-out queries fare better so and
    at most MOST of the block's pairs stay.
    """

    summary = "biases and values that make up for what was evicted"
    source = "Attention Matching, arXiv 2602.16284; GRKV, arXiv 2605.31105"
    needs_queries = True
    bias_nbytes = 2

    def __init__(self, *, keys: Literal["scored", "pursued"] = "scored") -> None:
        self.keys = keys

    def choose(self, evicted: Evicted) -> Tensor:
        if self.keys == "scored" or bool(evicted.keep_mask.all()):
            return evicted.keep_mask
        assert evicted.queries is not None
        mask, wholes = evicted.keep_mask.clone(), _wholes(evicted.queries, evicted)
        while batch := list(islice(wholes, SYSTEMS)):
            for whole, taken in zip(batch, _pursued(batch), strict=True):
                if whole.loss(taken) < whole.loss(whole.kept):
                    mask[whole.head, whole.places] = taken
        return mask

    def apply(self, layer: RaggedLayer, evicted: Evicted) -> RaggedLayer:
        if bool(evicted.keep_mask.all()) and not evicted.is_rounded:
            return layer
        queries = evicted.queries
        assert queries is not None and isinstance(layer.values, Tensor)
        values, bias = layer.values.float().clone(), layer.values.new_zeros(len(layer.values), dtype=torch.float32)
        for part, fitted, judge in _blocks(queries, evicted, layer):

            def read_back(changed: Tensor, part: slice = part) -> Tensor:
                return evicted.read_values(changed, part)

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
        part = evicted.part(block)
        mask = evicted.keep_mask[:, part]
        firsts, counts = evicted.keep_mask[:, : part.start].sum(1).tolist(), mask.sum(1).tolist()
        shown = _shown(queries, number, evicted)
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


@dataclass(frozen=True)
class Whole:
    """The pairs of one block of one head among which the pursuit chooses.

    places: [m] int64, where they stand in prefix and context.  kept: [m] bool, the pairs that the method keeps, all of
    which are here.  values: [m, D].  moments: of all of them.  targets: [m, r], of them with the principal directions
    of outputs and mass.  judge: the block as the held-out queries see it, with all these columns.
    """

    head: int
    places: Tensor
    kept: Tensor
    values: Tensor
    moments: Moments
    targets: Tensor
    judge: Block

    def loss(self, columns: Tensor) -> float:
        """Of the held-out queries where these pairs [m] bool stay and are mended."""
        moments = self.moments.part(columns)
        if not moments.is_seen:
            return math.inf
        return replace(self.judge, kept=self.judge.kept[:, columns]).loss(moments.fit(self.values[columns], RIDGES[0]))


def _wholes(queries: LayerQueries, evicted: Evicted) -> Iterator[Whole]:
    """Each block of each head of which some pairs stay, MOST at most, and which queries look at."""
    for number, block in enumerate(queries.blocks):
        part, shown = evicted.part(block), _shown(queries, number, evicted, THINNED)
        for head, kept in enumerate(evicted.keep_mask[:, part]):
            if not 0 < int(kept.sum()) <= MOST * len(kept):
                continue
            keys, values = (pairs[head, part].float() for pairs in (evicted.keys, evicted.values))
            attention = _attention(shown, head, keys, queries.softcap)
            fitted, judge = shown.block(head, attention, values, attention)
            mass = fitted.took[:, :-1].norm() / fitted.took[:, -1].norm()  # so it weighs as much as the outputs
            scale = torch.cat([torch.ones_like(values[0]), mass[None]])
            directions = scale.unsqueeze(1) * principal(fitted.took * scale)
            chosen = _candidates(fitted, directions, kept)
            fitted, judge = (replace(block, kept=block.kept[:, chosen]) for block in (fitted, judge))
            moments = Moments.of(fitted)
            if moments.is_seen:
                targets = moments.took @ directions
                yield Whole(head, part.start + chosen, kept[chosen], values[chosen], moments, targets, judge)


def _candidates(block: Block, directions: Tensor, kept: Tensor) -> Tensor:
    """The pairs among which the pursuit chooses, those that are kept and others that explain much alone: [n] int64.

    directions: [D + 1, r] of the targets.  kept: [m] bool.
    """
    alone = (block.kept.T @ (block.took @ directions)).square().sum(dim=1)
    alone /= block.kept.square().sum(dim=0).clamp_min(torch.finfo(torch.float32).tiny)
    count = min(len(kept), round(CANDIDATES * int(kept.sum())))
    return alone.masked_fill_(kept, math.inf).topk(count).indices.sort().values


def _pursued(batch: Sequence[Whole]) -> Iterator[Tensor]:
    """The pairs [m] bool that pursuit keeps of each block, as many as the method does."""
    size, counts = max(len(whole.kept) for whole in batch), [int(whole.kept.sum()) for whole in batch]
    missing = [size - len(whole.kept) for whole in batch]
    gram = [pad(whole.moments.gram, (0, n, 0, n)) for whole, n in zip(batch, missing, strict=True)]
    took = [pad(whole.targets, (0, 0, 0, n)) for whole, n in zip(batch, missing, strict=True)]
    found = pursue(torch.stack(gram), torch.stack(took), counts)
    return (taken[: len(whole.kept)] for whole, taken in zip(batch, found, strict=True))


def _shown(queries: LayerQueries, number: int, evicted: Evicted, every: int = 1) -> Shown:
    """The queries that a block is fitted to: all that repeat it, and a share of that of the others, evenly spread.

    every: of so many tokens that are not held out, one is taken.
    """
    own, others = (found.nonzero().squeeze(1) for found in (queries.block_of == number, queries.block_of != number))
    if len(others) > len(own) // OTHERS:
        others = others[torch.linspace(0, len(others) - 1, len(own) // OTHERS).long()]
    chosen = torch.cat([own, others]).sort().values
    is_held_out = torch.arange(len(chosen)) % HELD_OUT == HELD_OUT - 1
    fitted = chosen[~is_held_out][::every]
    chosen = torch.cat([fitted, chosen[is_held_out]])
    is_near = queries.chunk_of[chosen] == queries.chunk_of[own[0]]
    groups = len(queries.query) // len(evicted.keys)

    def rows(tensor: Tensor) -> Tensor:
        """[Hq, T, ...] as float32 [Hkv, R, ...], the query heads of a token beside one another."""
        found = tensor[:, chosen.to(tensor.device)].float()
        return found.reshape(-1, groups, *found.shape[1:]).transpose(1, 2).flatten(1, 2)

    return Shown(
        query=rows(queries.query).mul_(queries.scale),
        lse=rows(queries.lse),
        seen=with_mass(rows(queries.outputs)),
        is_near=is_near.repeat_interleave(groups).float().to(evicted.keys.device),
        num_fitted=len(fitted) * groups,
    )
