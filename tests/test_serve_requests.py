"""What clients are told before the engine sees a request: the middleware around a plain ASGI application; no vLLM."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from random_context import INFO, Shape, random_context
from tiny import tiny_model, tiny_tokenizer

import kvzip
from kvzip import store
from kvzip.hf.described import describe
from kvzip.integrations.vllm import extra_body, middleware, request
from kvzip.integrations.vllm.middleware import CheckContexts

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
LIMIT = 1 << 20


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """What vLLM's application knows of itself, with a store of `good`, `large`, `fetched`, `cut` and `other`."""
    model, folder = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("store")
    tiny_model("llama").save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    good, _ = random_context(Shape())
    info = replace(INFO, fingerprint=describe(str(model)).fingerprint())
    store.write(folder / "good.kvz", replace(good, info=info))
    store.write(folder / "other.kvz", good)
    store.write(folder / "large.kvz", replace(random_context(Shape(context_len=9000))[0], info=info))
    kvzip.load(model).compress(200 * "Norland. ", method="clusterkv").save(folder / "fetched.kvz")
    (folder / "cut.kvz").write_bytes((folder / "good.kvz").read_bytes()[:100])
    return application(model, folder)


def application(model: Path, folder: Path) -> SimpleNamespace:
    config = SimpleNamespace(
        model_config=SimpleNamespace(model=str(model), revision=None, trust_remote_code=False, max_model_len=300),
        cache_config=SimpleNamespace(block_size=32),
        kv_transfer_config=SimpleNamespace(
            kv_connector_extra_config={"store": str(folder), "max_context_bytes": LIMIT}
        ),
    )
    args = SimpleNamespace(api_key=None, chat_template=None, default_chat_template_kwargs=None)
    return SimpleNamespace(state=SimpleNamespace(args=args, vllm_config=config))


class Inner:
    """An application that notes what it was sent and answers in two parts."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.others: list[dict] = []

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            self.others.append(scope)
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.bodies.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for part in (b"data: 1\n\n", b"data: 2\n\n"):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": (await receive())["type"].encode()})


def exchange(
    served: SimpleNamespace,
    parts: list[bytes],
    path: str = CHAT,
    *,
    method: str = "POST",
    root: str = "",
    left: bool = False,
) -> tuple[Inner, list[dict]]:
    """Send a request in parts; the application behind the middleware, and the messages that came back."""
    inner, sent = Inner(), []
    messages = [{"type": "http.request", "body": part, "more_body": i + 1 < len(parts)} for i, part in enumerate(parts)]
    if left:
        messages[-1] = {"type": "http.disconnect"}

    async def receive() -> dict:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": root + path, "root_path": root, "app": served, "headers": []}
    asyncio.run(CheckContexts(inner)(scope, receive, send))
    return inner, sent


def refusal_of(served: SimpleNamespace, body: dict[str, Any], path: str = CHAT) -> dict[str, Any]:
    """The error that a request gets, which the application never sees; of a streamed one too."""
    for stream in ({}, {"stream": True}):
        inner, sent = exchange(served, [json.dumps({"model": "m", **body, **stream}).encode()], path)
        assert not inner.bodies and len(sent) == 2
        error = json.loads(sent[1]["body"])["error"]
        assert sent[0]["status"] == error["code"] and error.keys() == {"message", "type", "param", "code"}
        assert dict(sent[0]["headers"])[b"content-type"] == b"application/json"
        assert "\n" not in error["message"]
    return error


def passes(served: SimpleNamespace, body: bytes | dict[str, Any], path: str = CHAT, **options: Any) -> bool:
    """Whether a request comes through, and its answer back, untouched."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    parts = [raw[: len(raw) // 2], raw[len(raw) // 2 :], b""]
    inner, sent = exchange(served, parts, path, **options)
    assert not inner.bodies or inner.bodies == [raw]
    if inner.bodies:
        assert [message.get("body") for message in sent] == [None, b"data: 1\n\n", b"data: 2\n\n", b"http.disconnect"]
    return bool(inner.bodies)


def chat(*contents: str, role: str = "user", context: str = "good", **fields: Any) -> dict[str, Any]:
    messages = [{"role": role if i == 0 else "user", "content": text} for i, text in enumerate(contents)]
    return {"messages": messages, **extra_body(context), **fields}


def test_good_requests_pass(served: SimpleNamespace) -> None:
    assert passes(served, chat("Who?"))
    assert passes(served, chat("Who?", max_tokens=200, stream=True))
    assert passes(served, chat("Who?", max_tokens=400))  # vLLM refuses it, or gives what fits
    assert passes(served, request("good", "Who?", mode="question"), COMPLETION)
    assert passes(served, {"prompt": ["Who?", "Where?"], **extra_body("good", "question")}, COMPLETION)
    assert passes(served, {"prompt": [5, 6, 7], **extra_body("good", "raw")}, COMPLETION)
    opened = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    assert passes(served, {"prompt": opened, **extra_body("good")}, COMPLETION)


def test_what_is_not_ours_passes(served: SimpleNamespace) -> None:
    wrong = chat("Who?", context="none")
    assert not passes(served, wrong)  # so that the others could be refused
    assert not passes(served, wrong, root="/behind/a/proxy")
    assert passes(served, wrong, "/v1/models") and passes(served, wrong, "/tokenize")
    assert passes(served, wrong, method="GET")
    assert passes(served, {"messages": [{"role": "user", "content": "kvzip?"}]})
    assert passes(served, {"messages": [], "kv_transfer_params": {"other": "kvzip"}})
    for params in ("kvzip", ["kvzip"], None, 7):
        assert passes(served, {"kv_transfer_params": params, "kvzip": 1})
    for raw in (
        b"kvzip",
        b'{"kv_transfer_params": {"kvzip": ',
        b"[" * 100_000 + b"kvzip",
        b'"kvzip"',
        b"\xff kvzip",
        b"",
    ):
        assert passes(served, raw)


def test_what_can_not_be_rendered_here_is_left_to_the_engine(served: SimpleNamespace) -> None:
    def parts(**more: Any) -> dict[str, Any]:
        return chat("\n\nWho?", role="system", **more)

    assert not passes(served, parts())
    for more in ({"tools": [{}]}, {"chat_template_kwargs": {"a": 1}}, {"add_generation_prompt": False}):
        assert passes(served, parts(**more))
    for messages in (
        [],
        "Who?",
        [7],
        [{"role": "user"}],
        [{"role": "user", "content": [{"type": "text", "text": "Who?"}]}],
    ):
        assert passes(served, {"messages": messages, **extra_body("good")})
    served.state.args.chat_template = "own"
    try:
        assert passes(served, parts())
    finally:
        served.state.args.chat_template = None


def test_what_a_tokenizer_can_not_take_is_left_to_vllm(served: SimpleNamespace) -> None:
    assert passes(served, {"prompt": "\ud83d", **extra_body("good", "question")}, COMPLETION)
    assert refusal_of(served, chat("Who?", context="\ud83d"))["code"] == 404


def test_a_very_long_body_passes(served: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "MAX_NBYTES", 1000)
    assert passes(served, chat(4000 * "x", context="none"))


def test_a_client_that_leaves(served: SimpleNamespace) -> None:
    inner, sent = exchange(served, [b'{"kvzip"', b""], left=True)
    assert not inner.bodies and not sent


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (chat("Who?", context="none"), 404, "no context 'none' in the store"),
        (chat("Who?", context="../good"), 400, "no name of a context"),
        ({**chat("Who?"), "kv_transfer_params": {"kvzip": None}}, 400, "NoneType, expected a string"),
        (chat("Who?", context="other"), 400, "was made with 'tiny'"),
        (chat("Who?", context="cut"), 400, "can't use context 'cut': it is cut short"),
        (chat("Who?", context="fetched"), 400, "has clusters whose pairs are fetched: ask it with `kvzip ask`"),
        (chat("Who?", context="large"), 400, "don't fit"),
        (chat("Who?", echo=True), 400, "echo"),
        (chat("Who?", prompt_logprobs=0), 400, "prompt_logprobs"),
        (chat("Who?", max_tokens=260), 400, "ask for at most"),
        (chat("Who?", max_completion_tokens=260), 400, "ask for at most"),
        (chat("Be brief.", "Who?", role="system"), 400, "leave out the system message"),
        (chat(prompt_embeds="AAAA"), 400, "prompt embeddings"),
        ({**extra_body("good"), "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "images or audio"),
        ({**chat("Who?"), **extra_body("good", "poem")}, 400, "'as' is 'poem', allowed: chat, question, raw"),
        ({**chat("Who?"), "kv_transfer_params": {"kvzip": "good", "as": []}}, 400, "allowed: chat, question, raw"),
    ],
)  # fmt: skip
def test_a_refusal_has_its_status_and_reason(
    served: SimpleNamespace, body: dict[str, Any], status: int, words: str
) -> None:
    error = refusal_of(served, body)
    assert error["code"] == status and words in error["message"]
    assert error["type"] == ("NotFoundError" if status == 404 else "BadRequestError")


def test_refusals_of_completions(served: SimpleNamespace) -> None:
    assert "'as': 'question'" in refusal_of(served, {"prompt": "Who?", **extra_body("good")}, COMPLETION)["message"]
    assert "empty" in refusal_of(served, {"prompt": "", **extra_body("good", "raw")}, COMPLETION)["message"]
    both = {"prompt": ["Who?", 250 * "x"], **extra_body("good", "question"), "max_tokens": 20}
    assert "don't fit" in refusal_of(served, both, COMPLETION)["message"]


def test_contexts_beyond_the_limit(served: SimpleNamespace) -> None:
    extra = served.state.vllm_config.kv_transfer_config.kv_connector_extra_config
    extra["max_context_bytes"] = 100
    try:
        assert "raise max_context_bytes" in refusal_of(served, chat("Who?"))["message"]
    finally:
        extra["max_context_bytes"] = LIMIT


def test_the_store_is_looked_at_anew(served: SimpleNamespace) -> None:
    extra = served.state.vllm_config.kv_transfer_config.kv_connector_extra_config
    folder = Path(extra["store"])
    (folder / "new.kvz").write_bytes((folder / "good.kvz").read_bytes())
    assert passes(served, chat("Who?", context="new"))
    (folder / "new.kvz").unlink()
    assert refusal_of(served, chat("Who?", context="new"))["code"] == 404


def test_it_learns_at_the_start_what_is_served(served: SimpleNamespace) -> None:
    inner = Inner()
    checks = CheckContexts(inner)
    scope = {"type": "lifespan", "app": served}
    asyncio.run(checks(scope, lambda: None, lambda message: None))
    assert inner.others == [scope] and checks._checks is not None


def test_a_server_with_keys_gives_no_reasons_without_one(
    served: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Door:
        def __init__(self, app: Any, tokens: list[str]) -> None:
            self.app, self.tokens = app, tokens

        async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
            await send({"type": "http.response.start", "status": 401, "headers": [], "tokens": self.tokens})

    name = "vllm.entrypoints.serve.middleware.authenticate"
    module = ModuleType(name)
    module.AuthenticationMiddleware = Door  # type: ignore[attr-defined]
    parts = name.split(".")
    for end in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(parts[end - 1]))
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    _, sent = exchange(served, [json.dumps(chat("Who?", context="none")).encode()])
    assert sent[0]["status"] == 401 and sent[0]["tokens"] == ["secret"]
    monkeypatch.setattr(served.state.args, "api_key", ["own", ""])
    assert exchange(served, [b"{}"])[1][0]["tokens"] == ["own"]
