"""Attention backends: how the logits of dense tails and ragged contexts are computed on a device.

A backend is stateless and shared. `auto` chooses by device; every other name is taken as asked.
"""

from __future__ import annotations

from importlib import import_module
from typing import Protocol

import torch
from torch import Tensor

from kvzip.context import RaggedLayer
from kvzip.errors import BackendError, UnknownNameError

BACKENDS = {
    "native": "kvzip.backends.native:NativeBackend",
    "cpu": "kvzip.backends.cpu:CPUBackend",
    "reference": "kvzip.backends.reference:ReferenceBackend",
}


class Backend(Protocol):
    """Attention with log-sum-exp. Shapes and semantics as in `kvzip.ops.attention.attend`."""

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
        """Attention over dense keys [B, Hkv, S, D]."""
        ...

    def attend_ragged(
        self, query: Tensor, layer: RaggedLayer, *, scale: float, softcap: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attention of every query [B, Hq, T, D] to all pairs of its KV head in a full-attention layer."""
        ...

    def decode(
        self,
        query: Tensor,
        layer: RaggedLayer,
        keys: Tensor,
        values: Tensor,
        *,
        scale: float,
        softcap: float | None = None,
    ) -> Tensor:
        """The output [1, Hq, 1, D] of one new token over a full-attention layer and a tail [1, Hkv, S_tail, D]."""
        ...


def get_backend(name: str = "auto", device: torch.device | str = "cpu") -> Backend:
    """The backend of that name; `auto` takes `native` on a CPU, `cpu` where that can't be, and `reference` elsewhere.

    Raises UnknownNameError, and BackendError where a backend that was asked for can't run on this machine.
    """
    if name == "auto":
        if torch.device(device).type != "cpu":
            return get_backend("reference")
        try:
            return get_backend("native")
        except BackendError:
            return get_backend("cpu")
    if name not in BACKENDS:
        raise UnknownNameError.of("backend", name, ["auto", *BACKENDS])
    module, cls = BACKENDS[name].split(":")
    backend: Backend = getattr(import_module(module), cls)()
    return backend
