"""vLLM's CPU attention, and ours for tokens that stand behind a context."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
)

from kvzip.backends import get_backend
from kvzip.context import RaggedLayer
from kvzip.integrations.vllm.attending import LayerRule, Paged, attend_asked
from kvzip.integrations.vllm.paged import BlockLayout, learn_layout
from kvzip.integrations.vllm.plan import Plan, make_plan, once
from kvzip.integrations.vllm.working import Working

PLAIN = "kvzip_plain"  # where a step's metadata keeps that of its rows without a context


class KVZipCPUBackend(CPUAttentionBackend):
    """CPU_ATTN with contexts. Keeps the name, which vLLM looks up."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return KVZipCPUImpl


class KVZipCPUImpl(CPUAttentionBackendImpl):
    """vLLM's own attention, until `attach` and wherever no token of a batch stands behind a context."""

    working: Working | None = None

    def attach(self, working: Working, number: int, window: int | None, turned: tuple[Tensor, Tensor]) -> None:
        """working: which contexts there are.  number: of this layer.  turned: cosines and sines of one block back."""
        self.working, self.number = working, number
        self.rule = LayerRule(get_backend("auto", "cpu"), self.scale, window, *turned)
        self.layout: BlockLayout | None = None

    def hold(self, layer: RaggedLayer) -> RaggedLayer:
        """A layer as attention reads it: as it is, mapped from the file."""
        return layer

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        plan = None if self.working is None or attn_metadata is None else plan_of(attn_metadata, self.working)
        if plan is None:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        assert self.working is not None and attn_metadata is not None and output_scale is None
        if len(plan.plain):
            part = self._plain_part(layer, attn_metadata, plan)
            found = torch.empty_like(query[plan.plain_tokens])
            super().forward(layer, query[plan.plain_tokens], key, value, kv_cache, part, found)
            output.view(query.shape)[plan.plain_tokens] = found
        if self.layout is None:
            self.layout = self._learn(layer, kv_cache)
        contexts = {key: self.working.contexts[key][self.number] for key in plan.asked}
        attend_asked(self.rule, query, plan, contexts, Paged(kv_cache, self.layout), output.view(query.shape))
        return output

    def _learn(self, layer: Any, kv_cache: Tensor) -> BlockLayout:
        def write(keys: Tensor, values: Tensor, cache: Tensor, slots: Tensor) -> None:
            self.do_kv_cache_update(layer, keys, values, cache, slots)

        _, num_heads, block_size, width = kv_cache.shape
        return learn_layout(write, num_heads, block_size, width // 2, kv_cache.dtype)

    def _plain_part(self, layer: Any, metadata: CPUAttentionMetadata, plan: Plan) -> CPUAttentionMetadata:
        """The metadata of the rows without a context, made once a step for layers of one window."""
        parts = metadata.__dict__.setdefault(PLAIN, {})
        if self.sliding_window not in parts:
            starts, lengths = metadata.query_start_loc, metadata.seq_lens[plan.plain]
            new = starts.diff()[plan.plain]
            own_starts = torch.nn.functional.pad(new.cumsum(0), (1, 0)).to(starts.dtype)
            parts[self.sliding_window] = replace(
                metadata,
                num_actual_tokens=int(new.sum()),
                max_query_len=int(new.max()),
                query_start_loc=own_starts,
                max_seq_len=int(lengths.max()),
                seq_lens=lengths,
                block_table=metadata.block_table[plan.plain],
                scheduler_metadata=ops.cpu_attn_get_scheduler_metadata(
                    num_reqs=len(plan.plain),
                    num_heads=self.num_heads,
                    num_kv_heads=self.num_kv_heads,
                    head_dim=self.head_size,
                    seq_lens=lengths,
                    dtype=self.working.config.model_config.dtype if self.working else None,
                    query_start_loc=own_starts,
                    causal=metadata.causal,
                    sliding_window_size=self.sliding_window,
                    isa=layer.isa,
                    enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
                    kv_cache_dtype=self.kv_cache_dtype,
                ),
            )
        found: CPUAttentionMetadata = parts[self.sliding_window]
        return found


def plan_of(metadata: CPUAttentionMetadata, working: Working) -> Plan | None:
    """The plan of a step, made by its first layer."""

    def make() -> Plan | None:
        starts, lengths = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
        return make_plan(working.handles, metadata.block_table, starts, lengths, working.block_size)

    return once(metadata, make) if working.handles else None
