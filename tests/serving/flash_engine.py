"""The GPU backend in an engine on a CPU: a plain function in the place of FlashAttention's.

Imported by vLLM's worker (`worker_extension_cls`), it takes the place of the CPU's attention. Run as a script, it answers:
flash_engine.py MODEL STORE REQUESTS NUM_TOKENS; requests are a JSON list of {"context": name or null, "prompt": ...,
"max_tokens": ...}. It leaves answers.json in the store, a list of [text, text of the same request alone].
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from flash import Flash
from torch import Tensor
from vllm.v1.attention.backends import fa_utils, flash_attn
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from kvzip.integrations.vllm.gpu import KVZipFlashBackend, KVZipFlashImpl

FLASH = Flash()
IDLE = {  # arguments of vLLM's own forward pass that ask for nothing here
    *("alibi_slopes", "softcap", "scheduler_metadata", "fa_version", "q_descale", "k_descale", "v_descale"),
    *("dynamic_causal", "num_splits", "s_aux", "mask_mod", "aux_tensors"),
}


def kernel(return_softmax_lse: bool = False, **arguments: Any) -> Any:
    """`flash_attn_varlen_func`."""
    given = {name: value for name, value in arguments.items() if name not in IDLE}
    out, lse = FLASH(**given)
    return (out, lse) if return_softmax_lse else out


class Impl(KVZipFlashImpl):
    """The GPU's attention but for the kernels: the one that attends and the one that writes the cache."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.vllm_flash_attn_version = self.folded_version = 2

    def do_kv_cache_update(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
        size, pairs = kv_cache.shape[2], torch.cat([key, value], dim=-1)[: len(slots)]
        kv_cache.transpose(1, 2)[slots // size, slots % size] = pairs


class Backend(KVZipFlashBackend):
    """Under the name that the CPU's platform asks for."""

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"

    @staticmethod
    def get_impl_cls() -> type[Impl]:
        return Impl


class Extension:
    """What vLLM wants of a worker's extension: nothing. Importing it has replaced the attention."""

    fa_utils.flash_attn_varlen_func = flash_attn.flash_attn_varlen_func = kernel
    register_backend(AttentionBackendEnum["CPU_ATTN"], "flash_engine.Backend")


def main(model: str, store: str, requests: list[dict[str, Any]], num_tokens: int) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        block_size=32,
        max_num_seqs=8,
        max_num_batched_tokens=num_tokens,
        worker_extension_cls="flash_engine.Extension",
        kv_transfer_config={
            "kv_connector": "KVZipConnector",
            "kv_connector_module_path": "kvzip.integrations.vllm.connector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"store": store},
        },
    )
    prompts, params = [one["prompt"] for one in requests], []
    for one in requests:
        named = {"kv_transfer_params": {"kvzip": one["context"], "as": "question"}} if one["context"] else None
        params.append(SamplingParams(temperature=0, max_tokens=one["max_tokens"], extra_args=named))
    together = [found.outputs[0].text for found in llm.generate(prompts, params)]
    alone = [llm.generate([p], [s])[0].outputs[0].text for p, s in zip(prompts, params, strict=True)]
    Path(store, "answers.json").write_text(json.dumps(list(zip(together, alone, strict=True))), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4]))
