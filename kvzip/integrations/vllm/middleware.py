"""Tells clients why a request that names a context is refused; vLLM alone answers 500 without a reason."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

from kvzip.integrations.vllm import PARAMETER
from kvzip.integrations.vllm.checking import Checks, make_checks, named_context
from kvzip.integrations.vllm.library import MissingContext, RefusedRequest
from kvzip.store.refusal import one_line

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Message, Receive, Send], Awaitable[None]]

PATHS = ("/v1/chat/completions", "/v1/completions")
logger = logging.getLogger(__name__)
MAX_NBYTES = 16 << 20  # of a body that is looked at


class CheckContexts:
    """ASGI middleware for `--middleware`: answers 404 or 400, in OpenAI's format, what the engine would refuse.

    All else passes untouched: other paths, requests without a context, bodies that can't be parsed or are very long.
    """

    def __init__(self, app: App) -> None:
        self.app = app
        self._guarded: App | None = None
        self._checks: Checks | None = None
        self._lock = threading.Lock()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await asyncio.to_thread(self.prepare, scope["app"])  # so that no request waits for it
        if not is_looked_at(scope):
            await self.app(scope, receive, send)
            return
        if self._checks is None:
            await asyncio.to_thread(self.prepare, scope["app"])
        assert self._guarded is not None
        await self._guarded(scope, receive, send)

    def prepare(self, server: Any) -> None:
        """Learn from vLLM's application what it serves; done once."""
        with self._lock:
            if self._checks is None:
                args = server.state.args
                self._guarded = behind_key(self._checked, args.api_key)
                is_own = args.chat_template is None and not args.default_chat_template_kwargs
                self._checks = make_checks(server.state.vllm_config, renders_chats=is_own)

    async def _checked(self, scope: Message, receive: Receive, send: Send) -> None:
        messages, body = await read_body(receive)
        may_name = body if body is not None and PARAMETER.encode() in body else None
        refusal = await asyncio.to_thread(self._refusal, may_name) if may_name else None
        answer = self.app if refusal is None else answering(refusal)
        await answer(scope, replaying(messages, receive), send)

    def _refusal(self, body: bytes) -> RefusedRequest | None:
        assert self._checks is not None
        request = named_context(body)
        if request is None:
            return None
        try:
            with self._lock:  # a tokenizer is not made for several threads
                self._checks.check(request)
        except RefusedRequest as refusal:
            return refusal
        except Exception as error:  # as of a tokenizer that is given half a character: for vLLM to answer
            logger.warning("a request could not be checked: %s", one_line(error))
        return None


def is_looked_at(scope: Message) -> bool:
    """Whether a request may name a context."""
    if scope["type"] != "http" or scope["method"] != "POST":
        return False
    return str(scope["path"]).removeprefix(scope.get("root_path", "")) in PATHS


async def read_body(receive: Receive) -> tuple[list[Message], bytes | None]:
    """The messages so far, and the body in them; None where it is too long, or the client left."""
    messages: list[Message] = []
    parts: list[bytes] = []
    while sum(map(len, parts)) <= MAX_NBYTES:
        messages.append(message := await receive())
        if message["type"] != "http.request":
            return messages, None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return messages, b"".join(parts)
    return messages, None


def replaying(messages: list[Message], receive: Receive) -> Receive:
    """Gives the messages once more, then those that follow."""
    left = iter(messages)

    async def replay() -> Message:
        return next(left, None) or await receive()

    return replay


def answering(refusal: RefusedRequest) -> App:
    """An application that gives the reason."""
    is_missing = isinstance(refusal, MissingContext)
    status, kind = (404, "NotFoundError") if is_missing else (400, "BadRequestError")
    param = f"kv_transfer_params.{PARAMETER}" if is_missing else None
    error = {"message": str(refusal), "type": kind, "param": param, "code": status}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]

    async def answer(scope: Message, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return answer


def behind_key(app: App, keys: list[str] | None) -> App:
    """The application behind vLLM's own check of keys, which comes later than this middleware."""
    tokens = [key for key in (keys or [os.environ.get("VLLM_API_KEY", "")]) if key]
    if not tokens:
        return app
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    guarded: App = AuthenticationMiddleware(app, tokens)
    return guarded
