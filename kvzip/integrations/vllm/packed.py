"""Attention of a batch's tokens to contexts and to the tails behind them, by a FlashAttention function that is given.

Index arithmetic in plain torch, on whatever device the tensors are, without vLLM. Nothing waits for the device but
`make_packed_plan`, once a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvzip.context import RaggedLayer
from kvzip.errors import BackendError
from kvzip.integrations.vllm.attending import LayerRule, attend_window, turned_back
from kvzip.integrations.vllm.plan import Asked, asked_by, rows_behind

FOLDED = 8  # further numbers of a key that hold its bias: FlashAttention takes widths that are a multiple of 8
NUM_PARTS = 3  # that a bias is the sum of: 24 bits of it in bfloat16, as many as float32 has


@dataclass(frozen=True)
class PackedPlan:
    """A batch of R requests with contexts in it; tensors are on the device.

    asked: by key of the context.  block_table: [R, n] int32, where behind a context the handle is left out.  lengths:
    [R] int32, tokens in these blocks.  query_start_loc: [R + 1] int32.
    """

    asked: dict[str, Asked]
    block_table: Tensor
    lengths: Tensor
    query_start_loc: Tensor


@dataclass(frozen=True, eq=False)
class PackedLayer:
    """A layer of a context as FlashAttention reads it: one segment a head, all in the model's dtype.

    keys, values: [N, W], W is the head's width D, or D + FOLDED where the pairs have biases: then each query has ones
    there, the keys their biases, the values zeros.  cu_seqlens: [Hkv + 1] int32.  max_seqlen: of the longest segment.
    empty: [Hkv] bool, heads without a pair, or None where there are none.
    """

    keys: Tensor
    values: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    empty: Tensor | None

    @property
    def num_kv_heads(self) -> int:
        return len(self.cu_seqlens) - 1


@dataclass(frozen=True)
class FlashRule(LayerRule):
    """What attention is in one layer, and who computes it.

    backend: for the window of a context.  flash: as vLLM's `flash_attn_varlen_func`, by keywords, returns the output
    and the log-sum-exp [heads, tokens].  join: as vLLM's `merge_attn_states`.
    """

    flash: Callable[..., tuple[Tensor, Tensor]]
    join: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]


def make_packed_plan(
    handles: Mapping[int, str], block_table: Tensor, query_start_loc: Tensor, seq_lens: Tensor, block_size: int
) -> PackedPlan | None:
    """What a batch of R requests asks of contexts, or None where it asks none. The one wait for the device in a step.

    handles: key of the context by its first block.  block_table: [R, n] int32.  query_start_loc: [R + 1] int32.
    seq_lens: [R] int32, the handle's places included.
    """
    count = len(seq_lens)
    numbers = torch.cat([block_table[:count, 0], query_start_loc[: count + 1], seq_lens]).tolist()
    firsts, starts, lengths = numbers[:count], numbers[count : 2 * count + 1], numbers[2 * count + 1 :]
    found = rows_behind(handles, firsts, starts, lengths, block_size)
    if not found:
        return None
    behind = torch.zeros(count, dtype=torch.bool)
    behind[[one.row for some in found.values() for one in some]] = True
    behind = behind.to(block_table.device)
    return PackedPlan(
        asked={key: _on(block_table.device, asked_by(some)) for key, some in found.items()},
        block_table=without_handles(block_table[:count], behind),
        lengths=seq_lens - behind.to(seq_lens.dtype) * block_size,
        query_start_loc=query_start_loc[: count + 1],
    )


def without_handles(block_table: Tensor, behind: Tensor) -> Tensor:
    """A block table [R, n] whose rows `behind` [R] bool begin with their second block; the null block 0 fills them."""
    return torch.where(behind.unsqueeze(1), pad(block_table[:, 1:], (0, 1)), block_table)


def _on(device: torch.device, asked: Asked) -> Asked:
    return Asked(asked.tokens.to(device), asked.positions.to(device))


def pack_layer(layer: RaggedLayer, scale: float) -> PackedLayer:
    """A layer's pairs of all levels as numbers; those of one level that stand as such already are not copied.

    scale: of the layer's logits. Raises BackendError where a bias is beyond the dtype.
    """
    levels, heads = layer.levels, range(layer.num_kv_heads)
    lengths = layer.seqlens
    if len(levels) == 1:
        keys, values = layer.dense()
        bias = layer.bias
    else:
        parts = [(level, head) for head in heads for level in levels]
        keys, values = (torch.cat(rows) for rows in zip(*(level.read(head) for level, head in parts), strict=True))
        bias = torch.cat([_biases(level, head) for level, head in parts])
        bias = bias if any(level.bias is not None for level in levels) else None
    if bias is not None:
        keys, values = torch.cat([keys, folded(bias, scale, keys.dtype)], dim=1), pad(values, (0, FOLDED))
    offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=keys.device)
    empty = torch.tensor([length == 0 for length in lengths], device=keys.device) if 0 in lengths else None
    return PackedLayer(keys, values, offsets, max(lengths), empty)


def _biases(level: RaggedLayer, head: int) -> Tensor:
    """[n] float32 of the pairs of a head in that level."""
    rows = slice(level.offsets[head], level.offsets[head + 1])
    if level.bias is not None:
        return level.bias[rows]
    return torch.zeros(rows.stop - rows.start, device=level.device)


def folded(bias: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """[N, FOLDED] of `dtype` whose rows sum up, in float32, to `bias / scale`; bias: [N] float32.

    Raises BackendError where that is beyond the dtype.
    """
    rest, found = bias.float() / scale, torch.zeros(len(bias), FOLDED, dtype=dtype, device=bias.device)
    for part in range(NUM_PARTS):
        found[:, part] = rest.to(dtype)
        rest = rest - found[:, part].float()
    if not bool(found.isfinite().all()):
        raise BackendError(f"the context has biases that {dtype} can't hold: serve it in bfloat16")
    return found


def attend_packed(
    rule: FlashRule,
    query: Tensor,
    plan: PackedPlan,
    contexts: Mapping[str, PackedLayer],
    cache: tuple[Tensor, Tensor],
    output: Tensor,
    max_lens: tuple[int, int],
) -> None:
    """Fill `output` [T, Hq, D]: every token of the batch over its tail, and over its context where it has one.

    query: [T, Hq, D], rotated as vLLM does.  contexts: this layer of each, by key.  cache: paged keys and values
    [N, block_size, Hkv, D].  max_lens: no request has more new tokens, or more tokens, than that.
    """
    tail, tail_lse = rule.flash(
        q=query,
        k=cache[0],
        v=cache[1],
        out=output,
        cu_seqlens_q=plan.query_start_loc,
        max_seqlen_q=max_lens[0],
        seqused_k=plan.lengths,
        max_seqlen_k=max_lens[1],
        softmax_scale=rule.scale,
        causal=True,
        window_size=[-1, -1] if rule.window is None else [rule.window - 1, 0],
        block_table=plan.block_table,
    )
    before = query.new_zeros(query.shape)
    before_lse = query.new_full(tail_lse.shape, -torch.inf, dtype=torch.float32)
    for key, asked in plan.asked.items():
        if contexts[key].max_seqlen:
            part = _attend_context(rule, turned_back(rule, query[asked.tokens]), asked, contexts[key])
            before[asked.tokens], before_lse[:, asked.tokens] = part
    rule.join(output, before, before_lse, tail, tail_lse)


def _attend_context(rule: FlashRule, turned: Tensor, asked: Asked, layer: PackedLayer) -> tuple[Tensor, Tensor]:
    """Tokens [T, Hq, D] over the context that they ask: ([T, Hq, D], [Hq, T])."""
    if rule.window is None:
        return attend_heads(rule, turned, layer)
    keys, values = (t.view(1, layer.num_kv_heads, -1, t.shape[-1]) for t in (layer.keys, layer.values))
    out, lse = attend_window(rule, turned.transpose(0, 1).unsqueeze(0), asked.positions, keys, values)
    return out[0].transpose(0, 1), lse[0]


def attend_heads(rule: FlashRule, turned: Tensor, layer: PackedLayer) -> tuple[Tensor, Tensor]:
    """Tokens [T, Hq, D] over all pairs of a context: ([T, Hq, D], [Hq, T]).

    Each KV head is a sequence: its G query heads of all T tokens over its segment.
    """
    count, num_heads, dim = turned.shape
    num_kv_heads, width = layer.num_kv_heads, layer.keys.shape[1]
    grouped = turned.view(count, num_kv_heads, -1, dim).transpose(0, 1).reshape(num_kv_heads * count, -1, dim)
    out, lse = rule.flash(
        q=pad(grouped, (0, width - dim), value=1.0),
        k=layer.keys.unsqueeze(1),
        v=layer.values.unsqueeze(1),
        cu_seqlens_q=torch.arange(0, (num_kv_heads + 1) * count, count, dtype=torch.int32, device=turned.device),
        max_seqlen_q=count,
        cu_seqlens_k=layer.cu_seqlens,
        max_seqlen_k=layer.max_seqlen,
        softmax_scale=rule.scale,
        causal=False,
    )
    out = out.view(num_kv_heads, count, -1, width)[..., :dim].transpose(0, 1)  # [T, Hkv, G, D]
    lse = lse.reshape(-1, num_kv_heads, count).transpose(0, 1)  # [Hkv, G, T]
    if layer.empty is not None:  # what the library gives for a sequence without keys differs between its versions
        out = out.masked_fill(layer.empty[:, None, None], 0)
        lse = lse.masked_fill(layer.empty[:, None, None], -torch.inf)
    return out.reshape(count, num_heads, dim), lse.reshape(num_heads, count)
