"""What a model's attention is, learned by watching it: two forward passes over eight tokens.

Nothing is read from family-specific config keys but the position limit and the rotary frequencies, so a new model
family needs no code. What the watching does not confirm is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvzip.errors import ModelError
from kvzip.hf.seam import ATTENTION_NAME, BlankLayer, Call, View, register
from kvzip.ops.attention import attend
from kvzip.ops.rope import shift_keys

NUM_PROBE_TOKENS = 8
PROBE_OFFSET = 64
TOLERANCE = {
    torch.float32: 1e-3,
    torch.float64: 1e-3,
}  # coarser types: 0.1; a wrong rotation is off by the norm
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True)
class LayerGeometry:
    """One attention layer.  window: sliding window in tokens, or None.  inv_freq: [R/2], or None without RoPE."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    softcap: float | None
    window: int | None
    inv_freq: Tensor | None


@dataclass(frozen=True)
class Geometry:
    """The attention layers of a model, and the number of positions it was made for (None = no limit known).

    shared: layers that store nothing, each with the lower layer whose keys and values it uses.
    """

    layers: tuple[LayerGeometry, ...]
    max_positions: int | None
    shared: Mapping[int, int] = field(default_factory=dict)

    @property
    def full_shape(self) -> tuple[int, int]:
        """Full-attention layers, and the KV heads of each."""
        return len(self.full_layers), self.layers[self.full_layers[0]].num_kv_heads

    @property
    def full_layers(self) -> tuple[int, ...]:
        """The full-attention layers that store keys and values of their own."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.window is None and i not in self.shared)

    def can_share(self, layer: int, source: int) -> bool:
        """Whether `layer` may use the keys and values of `source`: lower, full attention, same heads, same rotation."""
        if not 0 <= source < layer < len(self.layers):
            return False
        a, b = self.layers[layer], self.layers[source]
        is_full, same_heads = a.window is b.window is None, (a.num_kv_heads, a.head_dim) == (b.num_kv_heads, b.head_dim)
        return (
            is_full
            and same_heads
            and a.inv_freq is not None
            and b.inv_freq is not None
            and (torch.equal(a.inv_freq, b.inv_freq))
        )

    def sharing(self, shared: Mapping[int, int]) -> Geometry:
        """The same model with these layers shared. Raises ModelError for a pair that can't be."""
        for layer, source in shared.items():
            if not self.can_share(layer, source) or source in shared:
                raise ModelError(
                    f"layer {layer} can't use the keys of layer {source}: give a lower full-attention layer that is "
                    "not shared itself, with the same heads and rotation"
                )
        return replace(self, shared=dict(shared))

    def kv_nbytes(self, num_tokens: int, dtype: torch.dtype) -> int:
        """Bytes of the model's own full cache after `num_tokens` tokens (sliding layers: their window)."""
        pairs = (
            layer.num_kv_heads * layer.head_dim * min(num_tokens, (layer.window or num_tokens + 1) - 1)
            for layer in self.layers
        )
        return sum(pairs) * 2 * dtype.itemsize


class _ProbeView(View):
    def __init__(self, keys: Tensor, values: Tensor, record: dict[str, Any]) -> None:
        self.keys, self.values, self.record = keys, values, record

    def attend(self, query: Tensor, call: Call) -> Tensor:
        self.record |= {"keys": self.keys[0], "num_heads": query.shape[1], "call": call}
        out, _ = attend(
            query, self.keys, self.values, scale=call.scale, softcap=call.softcap, mask=call.mask,
            is_causal=call.mask is None,
        )  # fmt: skip
        return out


class _ProbeLayer(BlankLayer):
    def __init__(self) -> None:
        super().__init__()
        self.record: dict[str, Any] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if key_states.shape != value_states.shape:
            raise ModelError(f"keys {tuple(key_states.shape)} and values {tuple(value_states.shape)} differ in shape")
        view = _ProbeView(key_states, value_states, self.record)
        return view, view


def probe(model: PreTrainedModel) -> Geometry:
    """Set the model to kvzip's attention and learn its geometry.

    Raises ModelError, with the reason, for a model that kvzip can't serve: encoder-decoder, attention that does not go
    through transformers' attention interface, keys and values of different shapes (MLA), linear attention, attention
    sinks, rotary frequencies that depend on the length, positions that are not a rotation, or no full-attention layer.
    """
    refuse = _Refusal(type(model).__name__)
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise refuse("it is an encoder-decoder; kvzip serves decoders")
    found = rope_types(config)
    if bad := found & set(LENGTH_DEPENDENT_ROPE):
        raise refuse(f"its rotary frequencies depend on the length ({', '.join(bad)}), so keys can't be shifted")
    register()
    model.set_attn_implementation(ATTENTION_NAME)
    near, far = _observe(model, 0, refuse), _observe(model, PROBE_OFFSET, refuse)
    layers = tuple(_layer_geometry(model, config, i, rec) for i, rec in enumerate(near))
    for index, (layer, a, b) in enumerate(zip(layers, near, far, strict=True)):
        _check_rotation(layer, a["keys"], b["keys"], index, refuse)
    geometry = Geometry(layers, getattr(config, "max_position_embeddings", None))
    if not geometry.full_layers:
        raise refuse("every layer has a sliding window, so its cache is small already and nothing can be evicted")
    if len({(layer.num_kv_heads, layer.head_dim) for layer in layers if layer.window is None}) > 1:
        raise refuse("its full-attention layers differ in the number or size of KV heads")
    return geometry


class _Refusal:
    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, reason: str) -> ModelError:
        return ModelError(f"kvzip can't serve {self.name}: {reason}")


@torch.inference_mode()
def _observe(model: PreTrainedModel, offset: int, refuse: _Refusal) -> list[dict[str, Any]]:
    """Run a few tokens at positions `offset`...; one record an attention layer."""
    num_layers = int(model.config.get_text_config(decoder=True).num_hidden_layers)
    cache = Cache(layers=[_ProbeLayer() for _ in range(num_layers)])
    ids = torch.arange(1, NUM_PROBE_TOKENS + 1, device=model.device).unsqueeze(0)
    positions = torch.arange(NUM_PROBE_TOKENS, device=model.device).unsqueeze(0) + offset
    try:
        model.get_decoder()(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
    except ModelError as error:
        raise refuse(str(error)) from None
    except (AttributeError, TypeError, ValueError, KeyError, IndexError, RuntimeError) as error:
        raise refuse(f"its attention does not go through transformers' attention interface ({error})") from error
    records = [layer.record for layer in cache.layers]
    silent = [i for i, record in enumerate(records) if not record]
    if silent:
        raise refuse(f"layers {silent} have no attention that goes through transformers' attention interface")
    return records


def _layer_geometry(model: PreTrainedModel, config: Any, index: int, record: dict[str, Any]) -> LayerGeometry:
    keys, call = record["keys"], record["call"]
    return LayerGeometry(
        num_heads=record["num_heads"],
        num_kv_heads=keys.shape[0],
        head_dim=keys.shape[2],
        scale=call.scale,
        softcap=call.softcap,
        window=call.window,
        inv_freq=inv_freq_of(model.get_decoder().modules(), config, index),
    )


def inv_freq_of(modules: Iterable[torch.nn.Module], config: Any, index: int) -> Tensor | None:
    """The rotary frequencies [R/2] of a layer, from the one of the modules that computes its cosines, or None."""
    layer_types = getattr(config, "layer_types", None)
    names = ([f"{layer_types[index]}_inv_freq"] if layer_types else []) + ["inv_freq"]
    for module in modules:
        for name in names:
            if isinstance(found := getattr(module, name, None), Tensor):
                return found.detach().cpu()
    return None


def _check_rotation(layer: LayerGeometry, near: Tensor, far: Tensor, index: int, refuse: _Refusal) -> None:
    """Keys at positions p + offset must be the keys at p, turned by the offset."""
    if layer.inv_freq is None:
        raise refuse(f"layer {index} has no rotary position embedding")
    turned = shift_keys(near.float().cpu(), layer.inv_freq, PROBE_OFFSET)
    error = (turned - far.float().cpu()).norm() / far.float().norm().cpu().clamp_min(1e-20)
    if not error <= TOLERANCE.get(near.dtype, 0.1):
        raise refuse(f"the keys of layer {index} are not a rotation by position (relative error {error:.2g})")


def rope_types(config: Any) -> set[str]:
    """The kinds of rotary frequencies that a text model's config names."""
    parameters = getattr(config, "rope_parameters", None) or {}
    groups = [v for v in parameters.values() if isinstance(v, dict)] or [parameters]
    return {group.get("rope_type", "default") for group in groups}
