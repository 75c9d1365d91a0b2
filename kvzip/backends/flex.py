"""FlexAttention for ragged keys: any dtype, biases and soft caps, on GPUs that PyTorch compiles for.

Not measured: the package is developed on a machine without a GPU. Results are checked against the reference on the CPU,
where FlexAttention runs uncompiled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from kvzip.backends.reference import ReferenceBackend, fold_batch, unfold_batch
from kvzip.context import RaggedLayer
from kvzip.ops.attention import soft_capped

_MASKS: WeakKeyDictionary[RaggedLayer, dict[int, BlockMask]] = WeakKeyDictionary()


class FlexBackend(ReferenceBackend):
    """Ragged keys in one FlexAttention call a layer: rows and keys of all heads side by side, each head its own block.

    Dense keys as the reference does. Quantized pairs are read a layer at a time.
    """

    def attend_level(
        self, query: Tensor, layer: RaggedLayer, *, scale: float, softcap: float | None = None
    ) -> tuple[Tensor, Tensor]:
        if layer.offsets[-1] == 0:
            return super().attend_level(query, layer, scale=scale, softcap=softcap)
        rows = fold_batch(query, layer.num_kv_heads)
        keys, values = layer.dense()
        out, aux = _attention(query.device.type)(
            rows.reshape(1, 1, -1, rows.shape[2]),
            keys[None, None],
            values[None, None],
            score_mod=_score_mod(layer.bias, softcap),
            block_mask=_block_mask(layer, rows.shape[1]),
            scale=scale,
            return_aux=AuxRequest(lse=True),
        )
        return unfold_batch(*blank_empty(out.view(rows.shape), aux.lse.view(rows.shape[:2]), layer), query)


def blank_empty(out: Tensor, lse: Tensor, layer: RaggedLayer) -> tuple[Tensor, Tensor]:
    """Rows [Hkv, R, D] of heads that hold nothing as the reference gives them, whatever the library says of them."""
    empty = layer.cu_seqlens.diff() == 0
    return out.masked_fill(empty[:, None, None], 0), lse.float().masked_fill(empty[:, None], -torch.inf)


@lru_cache(maxsize=2)
def _attention(device_type: str) -> Callable[..., Any]:
    """FlexAttention is fused only when compiled; uncompiled it is a reference, good enough for a CPU."""
    function: Any = flex_attention
    return function if device_type == "cpu" else torch.compile(function, dynamic=True)


def _score_mod(bias: Tensor | None, softcap: float | None) -> Callable[..., Tensor] | None:
    if bias is None and softcap is None:
        return None

    def modified(score: Tensor, batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        score = soft_capped(score, softcap)
        return score if bias is None else score + bias[kv_idx]

    return modified


def _block_mask(layer: RaggedLayer, num_rows: int) -> BlockMask:
    """Row r belongs to head r // num_rows and sees the keys of that head. Made once a layer and number of rows."""
    masks = _MASKS.setdefault(layer, {})
    if num_rows not in masks:
        device = layer.device
        seqlens = layer.cu_seqlens.diff()
        head_of_key = torch.repeat_interleave(torch.arange(len(seqlens), device=device), seqlens.to(device))

        def same_head(batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return q_idx // num_rows == head_of_key[kv_idx]

        sizes = layer.num_kv_heads * num_rows, layer.offsets[-1]
        masks[num_rows] = create_block_mask(same_head, None, None, *sizes, device=str(device))
    return masks[num_rows]
