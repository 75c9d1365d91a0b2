"""A worker's side: contexts are opened beside the engine's steps, and the attention layers find them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType

from kvzip.errors import KVZipError, ModelError
from kvzip.hf.described import Described
from kvzip.integrations.vllm.loading import Target, load_slots
from kvzip.integrations.vllm.messages import Load, Step
from kvzip.integrations.vllm.opened import Held, LayerShape, Rank, give_up, open_context
from kvzip.ops.rope import angles
from kvzip.portable import PortableContext
from kvzip.store.refusal import one_line

logger = init_logger(__name__)
NO_PLUGIN = "start vLLM with the plugin kvzip (VLLM_PLUGINS must allow it), on a GPU with --attention-backend CUSTOM"
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}


class Working:
    """What a worker knows: its part of the model, the contexts it holds, and which first blocks stand for them.

    handles: key by block.  contexts: by key, this worker's layers as their attention holds them.  portable: by key.
    """

    def __init__(self, config: Any, described: Described, groups: Sequence[Sequence[str]], block_size: int) -> None:
        """groups: the names of the layers that share blocks."""
        self.config, self.described, self.block_size = config, described, block_size
        self.handles: dict[int, str] = {}
        self.contexts: dict[str, dict[int, Any]] = {}
        self.portable: dict[str, PortableContext] = {}
        self._group_of = {name: number for number, names in enumerate(groups) for name in names}
        self._targets: dict[int, Target] = {}
        self._rank: Rank | None = None
        self._opening: dict[str, Future[Held]] = {}
        self._loads: list[Load] = []
        self._refused: list[str] = []
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="kvzip-open")

    @property
    def rank(self) -> Rank:
        assert self._rank is not None, "layers are attached before the first step"
        return self._rank

    def attach(self, modules: dict[str, Any]) -> None:
        """Tell each attention layer of this worker where to find contexts. Raises ModelError for one that can't."""
        model, device, why = self.config.model_config, torch.device("cpu"), ""
        for name, layer in modules.items():
            if not isinstance(layer, Attention):
                continue
            number = extract_layer_index(name)
            check_layer(number, layer, self.block_size)
            window = window_of(layer.impl)
            hold = getattr(layer.impl, "hold", lambda found: found)
            shape = LayerShape(layer.impl.num_kv_heads, model.get_total_num_kv_heads(), window, hold)
            self._targets[number] = Target(layer, self._group_of[name], shape)
            device, turned = layer.kv_cache.device, self.turn_of(number, layer.kv_cache.device)
            if hasattr(layer.impl, "attach"):
                layer.impl.attach(self, number, window, turned)
            else:
                why = f"the attention backend {type(layer.impl).__name__} serves portable contexts alone: {NO_PLUGIN}"
        if why:
            logger.warning("kvzip: %s", why)
        place = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        self._rank = Rank({n: t.shape for n, t in self._targets.items()}, *place, device, model.dtype, why)

    def turn_of(self, number: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [R/2] float32 of the rotation of a layer by one block back. Raises ModelError."""
        cos, sin = (
            part[0].float() for part in angles(self.described.inv_freq[number], torch.tensor([self.block_size]))
        )
        if not any(is_rotation(rope, self.block_size, cos, sin) for rope in _ROPE_DICT.values()):
            raise ModelError(
                f"kvzip can't serve contexts here: vLLM does not rotate layer {number} as the model that made them does"
            )
        return cos.to(device), -sin.to(device)

    def apply(self, step: Step) -> None:
        """What is to be done before a forward pass."""
        for key in step.closed:
            if self.contexts.pop(key, None) or self.portable.pop(key, None):
                give_up(key)
        for key, path in step.opened:
            self._opening[key] = self._pool.submit(open_context, path, key, self.rank)
        for block, held in step.handles:
            if held is None:
                self.handles.pop(block, None)
            else:
                self.handles[block] = held
        self._loads, self._refused = step.loads, self._refused + step.refused

    def load(self) -> None:
        """Fill the blocks of requests that ask portable contexts, right before the forward pass."""
        for one in self._loads:
            context = self.portable[one.key]
            load_slots(context, one.start, one.stop, one.blocks, self._targets, self.rank, self.block_size)
        self._loads = []

    def take_refused(self) -> list[str]:
        """Requests that are to end with an error."""
        refused, self._refused = self._refused, []
        return refused

    def take_opened(self) -> list[tuple[str, str]]:
        """(key, why it could not be opened or "") of contexts that are there since the last call."""
        done = [key for key, future in self._opening.items() if future.done()]
        return [(key, self._take(key, self._opening.pop(key))) for key in done]

    def _take(self, key: str, future: Future[Held]) -> str:
        try:
            held = future.result()
        except (KVZipError, OSError, RuntimeError, ValueError) as error:
            logger.warning("context %s can't be opened: %s", key, one_line(error))
            return one_line(error)
        if isinstance(held, PortableContext):
            self.portable[key] = held
        else:
            self.contexts[key] = held
        return ""

    def close(self) -> None:
        """Give everything up."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for key in [*self.contexts, *self.portable]:
            give_up(key)
        self.contexts, self.portable, self.handles = {}, {}, {}


def is_rotation(rope: Any, position: int, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Whether a rotary embedding of vLLM turns halves of a head, at that position by the angles of cos, sin [R/2]."""
    cache = getattr(rope, "cos_sin_cache", None)
    if cache is None or not rope.is_neox_style or cache.shape[-1] != 2 * len(cos) or len(cache) <= position:
        return False
    theirs = cache[position].float().cpu().view(2, -1)
    theirs = theirs / theirs.square().sum(dim=0).sqrt()  # some scale both
    return bool(torch.allclose(theirs, torch.stack([cos, sin]), rtol=0, atol=TOLERANCE[cache.dtype]))


def window_of(impl: Any) -> int | None:
    """The sliding window of a layer in tokens, as the Hugging Face model counts it, or None."""
    found = impl.sliding_window
    window = found if isinstance(found, int) else found[0] + 1  # FlashAttention: how far back, and how far ahead
    return window if window > 0 else None


def check_layer(number: int, layer: Any, block_size: int) -> None:
    """Raises ModelError for a layer whose attention behind a context would not be the model's."""
    impl = layer.impl
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
