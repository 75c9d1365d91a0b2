"""What goes into a layer's attention, and which of its output projection belongs to each query head.

The one place beside the seam that looks at a model's modules; a forward hook watches, nothing is patched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvzip.errors import ModelError
from kvzip.hf.geometry import Geometry


@contextmanager
def attention_inputs(model: PreTrainedModel, geometry: Geometry) -> Iterator[dict[int, Tensor]]:
    """The last inputs [T, E] (batch 1) of each full-attention layer's attention, kept up to date.

    A layer's inputs are there before its attention is computed. Whoever takes them out by then (`pop`) has those of one
    layer in memory at a time, and they are no copies.  Raises ModelError where a layer's attention is not found.
    """
    modules = _attention_modules(model)
    if missing := [index for index in geometry.full_layers if index not in modules]:
        raise ModelError(
            f"the attention of layer {missing[0]} of {type(model).__name__} is not found, so its inputs can't be "
            "watched: take a method that needs none, as kvzip"
        )
    with _watching_inputs(model, geometry, lambda hidden: hidden) as found:
        yield found


@contextmanager
def input_norms(model: PreTrainedModel, geometry: Geometry) -> Iterator[dict[int, Tensor]]:
    """Norms [T] float32 of the last inputs (batch 1) of each full-attention layer's attention, kept up to date."""
    with _watching_inputs(model, geometry, lambda hidden: hidden.float().norm(dim=-1)) as found:
        yield found


@contextmanager
def _watching_inputs(
    model: PreTrainedModel, geometry: Geometry, take: Callable[[Tensor], Tensor]
) -> Iterator[dict[int, Tensor]]:
    """What `take` makes of the inputs [T, E] that last entered each full-attention layer's attention."""
    found: dict[int, Tensor] = {}

    def hook_of(index: int) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[index] = take((kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])[0])

        return hook

    modules = _attention_modules(model)
    with ExitStack() as stack:
        for index in geometry.full_layers:
            handle = modules[index].register_forward_pre_hook(hook_of(index), with_kwargs=True)
            stack.callback(handle.remove)
        yield found


@contextmanager
def entering_streams(model: PreTrainedModel, geometry: Geometry) -> Iterator[dict[int, Tensor]]:
    """The residual stream [T, E] (batch 1) that last entered each full-attention layer, kept up to date.

    What enters a layer is the first argument of the module that holds its attention.
    """
    found: dict[int, Tensor] = {}

    def hook_of(index: int) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[index] = (args[0] if args else kwargs["hidden_states"])[0]

        return hook

    attention = {module: index for index, module in _attention_modules(model).items()}
    with ExitStack() as stack:
        for block in model.get_decoder().modules():
            for child in block.children():
                if attention.get(child) in geometry.full_layers:
                    handle = block.register_forward_pre_hook(hook_of(attention[child]), with_kwargs=True)
                    stack.callback(handle.remove)
        yield found


def output_weights(model: PreTrainedModel, geometry: Geometry) -> dict[int, Tensor]:
    """The output projection of each full-attention layer as [Hq, D, E], views of the weights.

    Raises ModelError where a layer has no plain projection of that shape (other names, packed weights).
    """
    modules, found = _attention_modules(model), {}
    for index in geometry.full_layers:
        layer = geometry.layers[index]
        weight = getattr(getattr(modules.get(index), "o_proj", None), "weight", None)
        if weight is None or weight.dim() != 2 or weight.shape[1] != layer.num_heads * layer.head_dim:
            raise ModelError(
                f"layer {index} of {type(model).__name__} has no output projection `o_proj` that can be read: "
                "take a method that needs no hidden states, as kvzip"
            )
        found[index] = weight.detach().reshape(-1, layer.num_heads, layer.head_dim).permute(1, 2, 0)
    return found


def _attention_modules(model: PreTrainedModel) -> dict[int, torch.nn.Module]:
    modules = model.get_decoder().modules()
    return {m.layer_idx: m for m in modules if hasattr(m, "layer_idx") and hasattr(m, "o_proj")}
