"""What can be said against a request before the engine sees it, with the reason. Needs no vLLM."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from kvzip.hf.described import describe
from kvzip.hf.prompts import Prompts
from kvzip.integrations.vllm import PARAMETER
from kvzip.integrations.vllm.library import (
    HAS_EMBEDS,
    HAS_MEDIA,
    NEEDS_PROMPT_LOGPROBS,
    Library,
    RefusedRequest,
    options_of,
    too_large,
)
from kvzip.integrations.vllm.prompts import EMPTY, Questions
from kvzip.integrations.vllm.room import Room

MEDIA = ("image_url", "input_audio", "audio_url", "video_url", "image_embeds", "audio_embeds")
CHANGES_PROMPT = ("tools", "documents", "chat_template", "chat_template_kwargs", "continue_final_message")


def named_context(body: bytes) -> dict[str, Any] | None:
    """The request, where its JSON names a context; None for anything else, which is not ours to judge."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return None
    params = content.get("kv_transfer_params") if isinstance(content, dict) else None
    return content if isinstance(params, dict) and PARAMETER in params else None


@dataclass(frozen=True)
class Checks:
    """Refuses what the engine would refuse, as far as that can be known here; the engine still looks at everything.

    library: the store.  limit: bytes of one context.  renders_chats: whether chats are rendered by the tokenizer's own
    template.
    """

    library: Library
    questions: Questions
    room: Room
    limit: int
    renders_chats: bool

    def check(self, request: Mapping[str, Any]) -> None:
        """Raises RefusedRequest for a request (as `named_context` gives it) that the engine would refuse."""
        for reason, is_wrong in wrongs(request).items():
            if is_wrong:
                raise RefusedRequest(reason)
        params = request["kv_transfer_params"]
        entry = self.library.find(params[PARAMETER])
        if entry.nbytes > self.limit:
            raise RefusedRequest(too_large(entry.name, entry.nbytes, self.limit))
        mode = self.questions.checked_mode(params.get("as", "chat"))
        for prompt in self._prompts(request):
            asked = self.questions.behind_context(prompt, mode)
            if not asked:
                raise RefusedRequest(EMPTY)
            self.room.max_new_tokens(entry, len(asked), self._max_tokens(request), len(prompt))

    def _prompts(self, request: Mapping[str, Any]) -> Iterator[list[int]]:
        """Ids of each prompt that is plain enough to be sure of them."""
        tokenizer = self.questions.prompts.tokenizer
        if "messages" in request:
            if self.renders_chats and is_plain_chat(request) and tokenizer.chat_template:
                try:
                    text = tokenizer.apply_chat_template(
                        request["messages"], tokenize=False, add_generation_prompt=True
                    )
                except Exception:  # a template is a program of its own; vLLM says what it dislikes
                    return
                yield self.questions.prompts.template_ids(str(text))
            return
        prompt = request.get("prompt")
        for one in prompt if isinstance(prompt, list) and not is_ids(prompt) else [prompt]:
            if isinstance(one, str):
                special = bool(request.get("add_special_tokens", True))
                yield list(tokenizer(one, add_special_tokens=special, verbose=False).input_ids)
            elif is_ids(one):
                yield list(one)

    def _max_tokens(self, request: Mapping[str, Any]) -> int:
        """As asked; whoever does not say gets what fits."""
        asked = request.get("max_completion_tokens") or request.get("max_tokens")
        return asked if type(asked) is int else self.room.max_model_len


def wrongs(request: Mapping[str, Any]) -> dict[str, bool]:
    """What is never served with a context, and whether a request asks for it."""
    messages = request.get("messages")
    contents = [one.get("content") for one in messages if isinstance(one, dict)] if isinstance(messages, list) else []
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    return {
        NEEDS_PROMPT_LOGPROBS: bool(request.get("echo")) or request.get("prompt_logprobs") is not None,
        HAS_EMBEDS: request.get("prompt_embeds") is not None,
        HAS_MEDIA: any(part.get("type") in MEDIA for part in parts),
    }


def is_plain_chat(request: Mapping[str, Any]) -> bool:
    """Whether the messages are text alone, and nothing else goes into the prompt."""
    messages = request["messages"]
    if not isinstance(messages, list) or not messages or any(request.get(name) for name in CHANGES_PROMPT):
        return False
    return request.get("add_generation_prompt", True) is True and all(
        isinstance(one, dict) and one.keys() <= {"role", "content"} and isinstance(one.get("content"), str)
        for one in messages
    )


def is_ids(prompt: Any) -> TypeGuard[list[int]]:
    """Whether a prompt is token ids."""
    return isinstance(prompt, list) and all(type(token) is int for token in prompt)


def make_checks(config: Any, *, renders_chats: bool) -> Checks:
    """The checks of a server with this VllmConfig. Raises ModelError or InputError."""
    model = config.model_config
    described = describe(model.model, revision=model.revision, trust_remote_code=model.trust_remote_code)
    folder, limit = options_of(config.kv_transfer_config.kv_connector_extra_config)
    room = Room(config.cache_config.block_size or 0, model.max_model_len, described.max_positions)
    return Checks(
        Library(folder, described.fingerprint()), Questions(Prompts(described.tokenizer)), room, limit, renders_chats
    )
