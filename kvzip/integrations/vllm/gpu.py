"""vLLM's FlashAttention, and ours for tokens that stand behind a context: `--attention-backend CUSTOM` on a GPU.

Written by the documentation and sources of vLLM 0.32 and never run on a GPU: docs/serving-gpu.md says what was tested.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides, is_quantized_kv_cache
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends import fa_utils
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

from kvzip.backends import get_backend
from kvzip.context import RaggedLayer
from kvzip.errors import BackendError, ModelError
from kvzip.integrations.vllm.packed import (
    FOLDED,
    FlashRule,
    PackedLayer,
    PackedPlan,
    attend_packed,
    make_packed_plan,
    pack_layer,
)
from kvzip.integrations.vllm.plan import once
from kvzip.integrations.vllm.working import Working

MAX_WIDTH = 256  # numbers of a key that FlashAttention 2 and 3 take


class KVZipFlashBackend(FlashAttentionBackend):
    """FLASH_ATTN with contexts, under the name that vLLM leaves to others."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        return KVZipFlashImpl

    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        return KVZipFlashBuilder


class KVZipFlashBuilder(FlashAttentionMetadataBuilder):
    """Keeps attention out of CUDA graphs, as it asks on the host who is behind a context.

    Each group of layers gets metadata of its own: a copy would carry the plan of another group's blocks.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER
    supports_update_block_table: bool = False


class KVZipFlashImpl(FlashAttentionImpl):
    """vLLM's own attention, until `attach` and wherever no token of a batch stands behind a context."""

    working: Working | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # asked for here, where vLLM's configuration is set, which may name a version
        self.folded_version = fa_utils.get_flash_attn_version(head_size=self.head_size + FOLDED)

    def attach(self, working: Working, number: int, window: int | None, turned: tuple[Tensor, Tensor]) -> None:
        """working: which contexts there are.  number: of this layer.  turned: cosines and sines of one block back.

        Raises ModelError where FlashAttention can't serve contexts.
        """
        self._check(number, working.config.model_config)
        self.working, self.number = working, number
        self.rule = FlashRule(
            get_backend("reference"), self.scale, window, *turned, flash=self._flash, join=merge_attn_states
        )

    def _check(self, number: int, model: Any) -> None:
        wrong = {
            "no FlashAttention of vLLM's on this device": self.vllm_flash_attn_version is None,
            "heads of 256 on FlashAttention 4, which wants whole pages": self.fa4_hd256,
            f"heads of more than {MAX_WIDTH}": self.head_size > MAX_WIDTH,
            f"a KV cache of {self.kv_cache_dtype}": is_quantized_kv_cache(self.kv_cache_dtype),
            "attention to both sides within images": model.is_mm_prefix_lm,
            "a window that leaves the prompt visible": model.rswa_window is not None,
        }
        for what, is_there in wrong.items():
            if is_there:
                raise ModelError(f"kvzip can't serve contexts here: layer {number} has {what}, which is not supported")

    def hold(self, layer: RaggedLayer) -> PackedLayer:
        """A layer as attention reads it. Raises BackendError where its biases don't fit."""
        held = pack_layer(layer, self.scale)
        if held.keys.shape[1] > MAX_WIDTH:
            raise BackendError(f"the context has biases, for which heads of {self.head_size} are too wide")
        return held

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: FlashAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        plan = None if self.working is None or attn_metadata is None else plan_of(attn_metadata, self.working)
        if plan is None:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        assert self.working is not None and attn_metadata is not None
        assert output_scale is None and output_block_scale is None and attn_metadata.causal is True
        count = attn_metadata.num_actual_tokens
        contexts = {key: self.working.contexts[key][self.number] for key in plan.asked}
        pairs = kv_cache.transpose(1, 2)  # [N, block_size, Hkv, 2 * D]: keys, then values
        attend_packed(
            self.rule,
            query[:count],
            plan,
            contexts,
            (
                canonicalize_singleton_dim_strides(pairs[..., : self.head_size]),
                canonicalize_singleton_dim_strides(pairs[..., self.head_size :]),
            ),
            output[:count],
            (attn_metadata.max_query_len, attn_metadata.max_seq_len),
        )
        return output

    def _flash(self, *, q: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
        """`flash_attn_varlen_func` in the version for keys of that width, with the log-sum-exp [heads, tokens]."""
        out, lse = fa_utils.flash_attn_varlen_func(
            q=q,
            **arguments,
            return_softmax_lse=True,
            fa_version=self.vllm_flash_attn_version if q.shape[-1] == self.head_size else self.folded_version,
            num_splits=1 if self.batch_invariant_enabled else 0,
        )
        return out, lse.contiguous()


def plan_of(metadata: FlashAttentionMetadata, working: Working) -> PackedPlan | None:
    """The plan of a step, made by its first layer."""

    def make() -> PackedPlan | None:
        return make_packed_plan(
            working.handles, metadata.block_table, metadata.query_start_loc, metadata.seq_lens, working.block_size
        )

    return once(metadata, make) if working.handles else None
