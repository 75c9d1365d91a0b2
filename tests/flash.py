"""What vLLM's attention functions are documented to do, in plain torch and row by row, for tests without a GPU.

After the docstrings of `flash_attn_varlen_func` and `merge_attn_states` in vLLM 0.32; asserts are what their wrappers
and kernels ask of the arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvzip.ops.attention import attend


class Flash:
    """`flash_attn_varlen_func` with the log-sum-exp returned.

    empty_lse: of a sequence without keys: FlashAttention 2 gives +inf, others -inf; its output is not a number here.
    calls: how many sequences each call had.
    """

    def __init__(self, empty_lse: float = torch.inf) -> None:
        self.empty_lse, self.calls = empty_lse, list[int]()

    def __call__(
        self,
        *,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float,
        causal: bool,
        cu_seqlens_k: Tensor | None = None,
        seqused_k: Tensor | None = None,
        block_table: Tensor | None = None,
        window_size: list[int] | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        check(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table)
        out = torch.full_like(q, torch.nan) if out is None else out
        lse = torch.full((q.shape[1], len(q)), torch.nan)
        starts = cu_seqlens_q.tolist()
        assert starts[0] == 0 and starts[-1] == len(q)
        self.calls.append(len(starts) - 1)
        for index in range(len(starts) - 1):
            rows = slice(starts[index], starts[index + 1])
            if block_table is not None and seqused_k is not None:
                keys, values = (paged(t, block_table[index], int(seqused_k[index])) for t in (k, v))
            else:
                assert cu_seqlens_k is not None
                segment = slice(*cu_seqlens_k[index : index + 2].tolist())
                keys, values = k[segment], v[segment]
            q_len = rows.stop - rows.start
            assert q_len <= max_seqlen_q and len(keys) <= max_seqlen_k
            if len(keys) == 0:
                out[rows], lse[:, rows] = torch.nan, self.empty_lse
                continue
            mask = visible(q_len, len(keys), causal, window_size)
            part, part_lse = attend(
                *(t.transpose(0, 1)[None] for t in (q[rows], keys, values)), scale=softmax_scale, mask=mask[None, None]
            )
            out[rows], lse[:, rows] = part[0].transpose(0, 1), part_lse[0]
        return out, lse


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    seqused_k: Tensor | None,
    block_table: Tensor | None,
) -> None:
    """What must hold of the arguments."""
    assert (cu_seqlens_k is None) != (seqused_k is None)
    assert (block_table is None) == (seqused_k is None)
    assert q.dim() == 3 and k.dim() == v.dim() == (3 if block_table is None else 4)
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] and q.shape[-1] % 8 == 0
    assert q.shape[1] % k.shape[-2] == 0 and q.dtype == k.dtype == v.dtype
    assert all(t.stride(-1) == 1 for t in (q, k, v))
    for numbers in (cu_seqlens_q, cu_seqlens_k, seqused_k, block_table):
        assert numbers is None or (numbers.dtype == torch.int32 and numbers.is_contiguous())
    count = len(cu_seqlens_q) - 1
    assert cu_seqlens_k is None or len(cu_seqlens_k) == count + 1
    assert block_table is None or (len(block_table) == count and seqused_k is not None and len(seqused_k) == count)


def paged(cache: Tensor, blocks: Tensor, length: int) -> Tensor:
    """The first `length` tokens [n, H, D] of a sequence in a cache [N, block_size, H, D]."""
    count = -(-length // cache.shape[1])
    assert count <= len(blocks)
    return cache[blocks[:count].long()].flatten(0, 1)[:length]


def visible(q_len: int, kv_len: int, causal: bool, window_size: list[int] | None) -> Tensor:
    """[q_len, kv_len] bool, aligned to the bottom right corner."""
    own = torch.arange(q_len).unsqueeze(1) + kv_len - q_len
    keys = torch.arange(kv_len)
    left, right = window_size or [-1, -1]
    mask = torch.ones(q_len, kv_len, dtype=torch.bool)
    if causal:
        mask &= keys <= own
    if left >= 0:
        mask &= keys >= own - left
    if right >= 0:
        mask &= keys <= own + right
    return mask


def join(output: Tensor, prefix_output: Tensor, prefix_lse: Tensor, suffix_output: Tensor, suffix_lse: Tensor) -> None:
    """`merge_attn_states`: outputs [T, H, D], log-sum-exp [H, T], where +inf is a row that saw nothing, as -inf is."""
    assert prefix_output.stride() == suffix_output.stride() and prefix_output.is_contiguous()
    assert prefix_lse.shape == suffix_lse.shape == (output.shape[1], output.shape[0])
    assert prefix_lse.dtype == suffix_lse.dtype == torch.float32
    both = torch.stack([torch.where(t == torch.inf, -torch.inf, t) for t in (prefix_lse, suffix_lse)])
    first, second = both.softmax(dim=0).transpose(1, 2).unsqueeze(-1)
    output.copy_(prefix_output.float() * first + suffix_output.float() * second)
