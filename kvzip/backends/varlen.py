"""FlashAttention over sequences of different lengths (`torch.nn.attention.varlen`): float16 and bfloat16 on CUDA.

Not measured: the package is developed on a machine without a GPU. That the arguments mean what they should is checked
on the CPU with a plain function in place of the library's.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.attention.varlen import AuxRequest, varlen_attn

from kvzip.backends.flex import FlexBackend, blank_empty
from kvzip.backends.reference import fold_batch, unfold_batch
from kvzip.context import RaggedLayer

DTYPES, DEVICES = (torch.float16, torch.bfloat16), ("cuda",)
MAX_DIM = 256


class VarlenBackend(FlexBackend):
    """Each KV head is a sequence: its rows are the queries, its segment the keys.

    What does not fit goes to FlexAttention: other dtypes, soft caps, biases, explicit masks.
    """

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scale: float,
        mask: Tensor | None = None,
        is_causal: bool = False,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        batch, num_heads, q_len, head_dim = query.shape
        total, kv_len = batch * q_len, keys.shape[2]
        # The layout of the log-sum-exp differs between versions of PyTorch; where its shape can't tell, don't guess.
        if mask is not None or softcap is not None or not _fits(query) or kv_len == 0 or total == num_heads:
            return super().attend(query, keys, values, scale=scale, mask=mask, is_causal=is_causal, softcap=softcap)
        out, lse = varlen_attn(
            query.transpose(1, 2).reshape(total, num_heads, head_dim),
            keys.transpose(1, 2).reshape(batch * kv_len, -1, head_dim),
            values.transpose(1, 2).reshape(batch * kv_len, -1, head_dim),
            _even_offsets(batch, q_len, query.device),
            _even_offsets(batch, kv_len, query.device),
            q_len,
            kv_len,
            return_aux=AuxRequest(lse=True),
            scale=scale,
            window_size=(-1, 0 if is_causal else -1),
            enable_gqa=True,
        )
        lse = lse if lse.shape == (total, num_heads) else lse.transpose(0, 1)
        return (
            out.reshape(batch, q_len, num_heads, head_dim).transpose(1, 2),
            lse.reshape(batch, q_len, num_heads).transpose(1, 2).float(),
        )

    def attend_level(
        self, query: Tensor, layer: RaggedLayer, *, scale: float, softcap: float | None = None
    ) -> tuple[Tensor, Tensor]:
        if softcap is not None or layer.bias is not None or not _fits(query) or layer.offsets[-1] == 0:
            return super().attend_level(query, layer, scale=scale, softcap=softcap)
        rows = fold_batch(query, layer.num_kv_heads)
        num_kv_heads, num_rows, head_dim = rows.shape
        keys, values = layer.dense()
        out, lse = varlen_attn(
            rows.reshape(-1, 1, head_dim),
            keys.unsqueeze(1),
            values.unsqueeze(1),
            _even_offsets(num_kv_heads, num_rows, query.device),
            layer.cu_seqlens,
            num_rows,
            max(end - start for start, end in pairwise(layer.offsets)),
            return_aux=AuxRequest(lse=True),
            scale=scale,
        )
        return unfold_batch(*blank_empty(out.view(rows.shape), lse.reshape(rows.shape[:2]), layer), query)


def _fits(query: Tensor) -> bool:
    return query.dtype in DTYPES and query.device.type in DEVICES and query.shape[-1] <= MAX_DIM


def _even_offsets(count: int, length: int, device: torch.device) -> Tensor:
    """[count + 1] int32: 0, length, 2 * length, ..."""
    return torch.arange(0, (count + 1) * length, length, dtype=torch.int32, device=device)
