"""`kvzip serve`: vLLM's own server, with the contexts of a folder."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvzip.cli.border import say
from kvzip.cli.loading import stable_name, start
from kvzip.cli.options import MODEL_HELP, complete_model, examples
from kvzip.cli.screen import Bars, plural

if TYPE_CHECKING:
    from kvzip.integrations.vllm.flags import Serving
    from kvzip.integrations.vllm.serve import Survey

EPILOG = examples(
    "kvzip serve qwen2.5-coder-0.5b --store contexts",
    "kvzip serve org/name --store /shared/contexts --host 0.0.0.0 --port 8000",
    "kvzip serve smollm2-135m --store contexts -- --max-model-len 4096 --enforce-eager",
)
QUESTION = "What is this text about?"


def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, autocompletion=complete_model)],
    store: Annotated[
        str, typer.Option(metavar="DIR", help="Folder of .kvz files, which may come and go while it runs.")
    ],
    flags: Annotated[
        list[str] | None, typer.Argument(metavar="[-- FLAG]...", help="Flags of vLLM's server.", show_default=False)
    ] = None,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where to listen; 0.0.0.0 takes requests of other machines.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=1, max=65535, help="Where to listen.")] = 8000,
    max_context_bytes: Annotated[
        str, typer.Option(metavar="AMOUNT", help="Of contexts that are open at a time, as 4GiB.")
    ] = "4GiB",
) -> None:
    """Serve the contexts of a folder.

    Starts vLLM's OpenAI server with kvzip's plugin, and ends it. Needs `pip install 'kvzip[vllm]'`.

    A request names a context beside its messages: "kv_transfer_params": {"kvzip": NAME}.
    """
    from kvzip.integrations.vllm.flags import check_flags, command, shutdown_timeout

    own = list(flags or ())
    check_flags(own)
    wait_s = shutdown_timeout(own)
    serving, found, has_chat, package = prepare(model, store, own, host, port, max_context_bytes)
    say_survey(serving, found)

    from kvzip.integrations.vllm.processes import GRACE_S, watch
    from kvzip.loading import choose_device

    started = command(serving, package, on_gpu=choose_device("auto").type == "cuda")
    context = found.fitting[0].name if found.fitting else "NAME"
    watch(started, serving.url, usage(serving, context, has_chat=has_chat), grace_s=GRACE_S + wait_s)


def prepare(
    model: str, store: str, flags: list[str], host: str, port: int, max_context_bytes: str
) -> tuple[Serving, Survey, bool, str]:
    """What is to be served, what is in the store, whether the model knows chats, vLLM's package; all checked."""
    with Bars() as bars:
        start(bars)
        from kvzip.budget import parse_nbytes
        from kvzip.hf.described import describe
        from kvzip.integrations.vllm import serve as server
        from kvzip.integrations.vllm.flags import Serving, has_flag
        from kvzip.integrations.vllm.library import Library
        from kvzip.loading import resolve

        package, folder = server.check_environment(), Path(store).expanduser()
        limit = parse_nbytes(max_context_bytes, "max-context-bytes")
        server.names_in(folder)
        server.check_port(host, port)
        with bars.step(f"Looking at {model}"):
            trusts = has_flag(flags, "--trust-remote-code")
            described = describe(resolve(stable_name(model), bars), trust_remote_code=trusts, fetch=True)
            library = Library(folder.resolve(), described.fingerprint())
        with bars.step(f"Looking at {store}"):
            found = server.survey(library, limit, described.max_positions)
    serving = Serving(described.folder, model, library.folder, limit, host, port, flags)
    return serving, found, bool(described.tokenizer.chat_template), package


def say_survey(serving: Serving, found: Survey) -> None:
    """How many contexts fit, and why others do not."""
    say(f"kvzip: {plural(len(found.fitting), 'context')} in {serving.store} for {serving.name}")
    for name, reason in found.refused:
        say(f"kvzip: {name} can't be asked: {reason}")


def usage(serving: Serving, context: str, *, has_chat: bool) -> str:
    """How to ask a context, with curl and with the client `openai`."""
    from kvzip.integrations.vllm import STOP, extra_body, request

    mode = "chat" if has_chat else "question"
    body: dict[str, Any] = {"model": serving.name, **request(context, QUESTION, mode=mode), "max_tokens": 100}
    path = "/v1/chat/completions" if has_chat else "/v1/completions"
    key = "YOUR_KEY" if needs_key(serving) else None
    keyed = f" -H 'Authorization: Bearer {key}'" if key else ""
    call = f"messages={body['messages']!r}" if has_chat else f"prompt={QUESTION!r}, stop=[{STOP!r}]"
    text = "answer.choices[0].message.content" if has_chat else "answer.choices[0].text"
    ask = "chat.completions" if has_chat else "completions"
    return f"""
kvzip: serving {serving.name} on {serving.url}

With curl:

curl {serving.url}{path} -H 'Content-Type: application/json'{keyed} \\
  -d {shlex.quote(json.dumps(body))}

In Python, with the package openai:

from openai import OpenAI

client = OpenAI(base_url="{serving.url}/v1", api_key="{key or "not needed"}")
answer = client.{ask}.create(
    model={serving.name!r}, max_tokens=100,
    {call},
    extra_body={extra_body(context, mode)!r},
)
print({text})
"""


def needs_key(serving: Serving) -> bool:
    from kvzip.integrations.vllm.flags import has_flag

    return has_flag(serving.flags, "--api-key") or bool(os.environ.get("VLLM_API_KEY"))
