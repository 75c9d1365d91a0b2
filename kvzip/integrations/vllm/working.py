"""A worker's side: contexts are opened beside the engine's steps, and the attention layers find them."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType

from kvzip.errors import KVZipError, ModelError
from kvzip.hf.described import Described
from kvzip.integrations.vllm.messages import Step
from kvzip.integrations.vllm.opened import LayerShape, Rank, give_up, open_context
from kvzip.ops.rope import angles
from kvzip.store.refusal import one_line

logger = init_logger(__name__)


class Working:
    """What a worker knows: its part of the model, the contexts it holds, and which first blocks stand for them.

    handles: key by block.  contexts: by key, this worker's layers as their attention holds them.
    """

    def __init__(self, config: Any, described: Described, block_size: int) -> None:
        self.config, self.described, self.block_size = config, described, block_size
        self.handles: dict[int, str] = {}
        self.contexts: dict[str, dict[int, Any]] = {}
        self._rank: Rank | None = None
        self._opening: dict[str, Future[dict[int, Any]]] = {}
        self._refused: list[str] = []
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="kvzip-open")

    def attach(self, modules: dict[str, Any]) -> None:
        """Tell each attention layer of this worker where to find contexts. Raises ModelError for one that can't."""
        layers = {extract_layer_index(name): m for name, m in modules.items() if isinstance(m, Attention)}
        model = self.config.model_config
        shapes, device = dict[int, LayerShape](), torch.device("cpu")
        for number, layer in sorted(layers.items()):
            check_layer(number, layer, self.block_size)
            impl = layer.impl
            window = impl.sliding_window if isinstance(impl.sliding_window, int) else impl.sliding_window[0] + 1
            shapes[number] = LayerShape(
                impl.num_kv_heads, model.get_total_num_kv_heads(), window if window > 0 else None, impl.hold
            )
            device = layer.kv_cache.device
            impl.attach(self, number, shapes[number].window, self.turn_of(number, device))
        place = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        self._rank = Rank(shapes, *place, device, model.dtype)

    def turn_of(self, number: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [R/2] float32 of the rotation of a layer by one block back."""
        cos, sin = angles(self.described.inv_freq[number], torch.tensor([-self.block_size]))
        return cos[0].to(device, torch.float32), sin[0].to(device, torch.float32)

    def apply(self, step: Step) -> None:
        """What is to be done before a forward pass."""
        for key in step.closed:
            if self.contexts.pop(key, None) is not None:
                give_up(key)
        for key, path in step.opened:
            assert self._rank is not None
            self._opening[key] = self._pool.submit(open_context, path, key, self._rank)
        for block, held in step.handles:
            if held is None:
                self.handles.pop(block, None)
            else:
                self.handles[block] = held
        self._refused += step.refused

    def take_refused(self) -> list[str]:
        """Requests that are to end with an error."""
        refused, self._refused = self._refused, []
        return refused

    def take_opened(self) -> list[tuple[str, str]]:
        """(key, why it could not be opened or "") of contexts that are there since the last call."""
        done = [key for key, future in self._opening.items() if future.done()]
        return [(key, self._take(key, self._opening.pop(key))) for key in done]

    def _take(self, key: str, future: Future[dict[int, Any]]) -> str:
        try:
            self.contexts[key] = future.result()
        except (KVZipError, OSError, RuntimeError, ValueError) as error:
            logger.warning("context %s can't be opened: %s", key, one_line(error))
            return one_line(error)
        return ""

    def close(self) -> None:
        """Give everything up."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for key in self.contexts:
            give_up(key)
        self.contexts, self.handles = {}, {}


def check_layer(number: int, layer: Any, block_size: int) -> None:
    """Raises ModelError for a layer whose attention behind a context would not be the model's."""
    impl = layer.impl
    if not hasattr(impl, "attach"):
        raise ModelError(
            f"layer {number} has {type(impl).__name__}, which knows no contexts: start vLLM with the plugin kvzip "
            "(VLLM_PLUGINS must allow it), on a GPU with --attention-backend CUSTOM"
        )
    wrong = {
        "attention of another type than a decoder's": impl.attn_type != AttentionType.DECODER,
        "a soft cap": bool(getattr(impl, "logits_soft_cap", 0) or 0),
        "ALiBi": impl.alibi_slopes is not None,
        "attention sinks": impl.sinks is not None,
        "keys of another layer": impl.kv_sharing_target_layer_name is not None,
        f"a cache in blocks that are not the handle's {block_size} tokens": layer.kv_cache.shape[2:3] != (block_size,),
    }
    for what, is_there in wrong.items():
        if is_there:
            raise ModelError(f"kvzip can't serve contexts here: layer {number} has {what}, which was not tested")
