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
    "cpu": "kvzip.backends.cpu:CPUBackend",
    "flex": "kvzip.backends.flex:FlexBackend",
    "native": "kvzip.backends.native:NativeBackend",
    "reference": "kvzip.backends.reference:ReferenceBackend",
    "varlen": "kvzip.backends.varlen:VarlenBackend",
}


PREFERRED = {"cpu": ("native", "cpu"), "cuda": ("varlen", "flex", "reference")}


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
    """The backend of that name; `auto` takes the first of the device's in `PREFERRED` that can run here.

    Raises UnknownNameError, and BackendError where a backend that was asked for can't run on this machine.
    """
    if name == "auto":
        return _first_that_runs(PREFERRED.get(torch.device(device).type, ("reference",)))
    if name not in BACKENDS:
        raise UnknownNameError.of("backend", name, ["auto", *BACKENDS])
    module, cls = BACKENDS[name].split(":")
    try:
        backend: Backend = getattr(import_module(module), cls)()
    except ImportError as error:
        raise BackendError(
            f"the backend {name!r} needs a later torch than {torch.__version__} ({error}): update torch, or take "
            "backend='auto'"
        ) from error
    return backend


def _first_that_runs(names: tuple[str, ...]) -> Backend:
    for name in names[:-1]:
        try:
            return get_backend(name)
        except BackendError:
            continue
    return get_backend(names[-1])
