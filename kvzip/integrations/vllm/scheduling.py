"""The scheduler's side: which request asks which context, which block stands for it, what is refused.

A request that names a context gets one block of placeholders before its own tokens, the handle, which is claimed as
computed elsewhere and never is. Requests of one context share it through vLLM's own prefix cache. A portable context
gets as many placeholders as it has slots, and these are filled.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvzip.integrations.vllm import PARAMETER
from kvzip.integrations.vllm.library import (
    HAS_EMBEDS,
    HAS_MEDIA,
    NEEDS_PROMPT_LOGPROBS,
    Entry,
    Library,
    RefusedRequest,
    too_large,
)
from kvzip.integrations.vllm.messages import Load, Reports, Step
from kvzip.integrations.vllm.prompts import EMPTY, Questions
from kvzip.integrations.vllm.room import Room


@dataclass
class Open:
    """A context that workers hold, or were asked to open.

    waiting: workers that have not answered yet.  live: requests that ask it, by id.  used: when the last one came.
    """

    entry: Entry
    waiting: int
    live: set[str] = field(default_factory=set)
    used: float = 0.0


class Contexts:
    """Which contexts the workers hold: opened when asked, the least recently used given up beyond a limit.

    limit: bytes of pairs that may be open.  num_workers: that have to answer.
    """

    def __init__(self, limit: int, num_workers: int) -> None:
        self.limit, self.num_workers = limit, num_workers
        self.open: dict[str, Open] = {}
        self.failed: dict[str, str] = {}
        self.step = Step()

    def is_ready(self, entry: Entry, request_id: str) -> bool:
        """Whether all workers hold it; asks them to open it where that was not done and there is room.

        Raises RefusedRequest where they could not, or it alone is beyond the limit.
        """
        if entry.nbytes > self.limit:
            raise RefusedRequest(too_large(entry.name, entry.nbytes, self.limit))
        if (reason := self.failed.pop(entry.key, None)) is not None:
            raise RefusedRequest(reason)
        if entry.key not in self.open and not self._make_room(entry.nbytes):
            return False
        if entry.key not in self.open:
            self.open[entry.key] = Open(entry, self.num_workers)
            self.step.opened.append((entry.key, str(entry.path)))
        found = self.open[entry.key]
        found.live.add(request_id)
        found.used = time.monotonic()
        return found.waiting == 0

    def _make_room(self, nbytes: int) -> bool:
        """Give up what nobody asks, the least recently used first, until so much fits; whether it does."""
        used = sum(one.entry.nbytes for one in self.open.values())
        idle = sorted((one for one in self.open.values() if not one.live and not one.waiting), key=lambda one: one.used)
        for one in idle:
            if used + nbytes <= self.limit:
                break
            del self.open[one.entry.key]
            self.step.closed.append(one.entry.key)
            used -= one.entry.nbytes
        return used + nbytes <= self.limit

    def answered(self, reports: Reports) -> None:
        """What workers say of the contexts that they were to open."""
        for key, reason in reports.opened:
            if key in self.open:
                self.open[key].waiting -= 1
                if reason:
                    self.failed[key] = reason
        for key in [key for key in self.failed if key in self.open and self.open[key].waiting == 0]:
            del self.open[key]
            self.step.closed.append(key)

    def finished(self, key: str, request_id: str) -> None:
        """The request asks it no more."""
        if key in self.open:
            self.open[key].live.discard(request_id)


class Scheduling:
    """Admits requests that name a context, and refuses those that can't be served right.

    What the engine's hooks call, in their order: `arrived`, `num_claimed`, `placed`, `take_step`, `answered`, `left`.
    """

    def __init__(self, library: Library, questions: Questions, contexts: Contexts, room: Room) -> None:
        self.library, self.questions, self.contexts, self.room = library, questions, contexts, room
        self._secret = uuid.uuid4().hex  # no caller's salt can name a handle
        self._entries: dict[str, Entry] = {}
        self._refused: dict[str, str] = {}
        self._handles: dict[int, str] = {}  # what the workers know: key by first block

    def arrived(self, request: Any) -> str | None:
        """A new request; one that names a context is rewritten. Returns why it is refused, or None."""
        params = request.kv_transfer_params
        if not isinstance(params, dict) or PARAMETER not in params:
            return None
        try:
            self._admit(request, params)
        except RefusedRequest as refusal:
            self._refuse(request, str(refusal))
            return str(refusal)
        return None

    def _admit(self, request: Any, params: dict[str, Any]) -> None:
        check_request(request)
        entry = self.library.find(params[PARAMETER])
        asked = self.questions.behind_context(request.prompt_token_ids, params.get("as", "chat"))
        if not asked:
            raise RefusedRequest(EMPTY)
        request.max_tokens = self.room.max_new_tokens(entry, len(asked), request.max_tokens, request.num_prompt_tokens)
        self._entries[request.request_id] = entry
        self.contexts.failed.pop(entry.key, None)  # of an earlier request; the file may be whole by now
        ids = [self.questions.placeholder] * self.room.num_placeholders(entry) + asked
        rewrite(request, ids, salted(self._secret, entry.key, request.cache_salt))

    def _refuse(self, request: Any, reason: str) -> None:
        self._refused[request.request_id] = reason
        request.skip_reading_prefix_cache = False  # or nothing could be claimed, and it would be computed as text
        rewrite(request, request.prompt_token_ids or [0], salted(self._secret, "refused", request.request_id))

    def num_claimed(self, request: Any, num_local: int) -> tuple[int | None, bool]:
        """(tokens beyond `num_local` cached ones that are there, whether they come later), as the hook returns it.

        None = ask again: the workers are opening the context. A refused request claims a token that will not come.
        """
        entry = self._entries.get(request.request_id)
        if entry is not None and request.request_id not in self._refused:
            try:
                if not self.contexts.is_ready(entry, request.request_id):
                    return None, False
                return max(0, self.room.num_placeholders(entry) - num_local), False
            except RefusedRequest as refusal:
                self._refuse(request, str(refusal))
        return (1, True) if request.request_id in self._refused else (0, False)

    def placed(self, request: Any, blocks: Sequence[Sequence[int]], num_claimed: int) -> None:
        """The blocks of an admitted request are known, one list a group of layers."""
        if request.request_id in self._refused:
            if num_claimed:
                self.contexts.step.refused.append(request.request_id)
            return
        entry = self._entries.get(request.request_id)
        is_handle = entry is not None and entry.num_slots is None
        for first in {group[0] for group in blocks if group} - {0}:  # 0: a window has left its first block behind
            if entry is not None and is_handle and self._handles.get(first) != entry.key:
                assert num_claimed == self.room.block_size, "a cached first block is a handle that the workers know"
                self._hold(first, entry.key)
            elif not is_handle and first in self._handles:
                self._hold(first, None)
        if entry is not None and entry.num_slots is not None and num_claimed:
            start, own = entry.num_slots - num_claimed, tuple(tuple(group) for group in blocks)
            self.contexts.step.loads.append(Load(entry.key, start, entry.num_slots, own))

    def _hold(self, block: int, key: str | None) -> None:
        if key is None:
            del self._handles[block]
        else:
            self._handles[block] = key
        self.contexts.step.handles.append((block, key))

    def take_step(self) -> Step:
        """What the workers are to do before the next forward pass."""
        step, self.contexts.step = self.contexts.step, Step()
        return step

    def answered(self, reports: Reports) -> None:
        """What the workers say of contexts that they were to open."""
        self.contexts.answered(reports)

    def left(self, request_id: str) -> str | None:
        """A request is finished. Returns why it was refused, or None."""
        entry = self._entries.pop(request_id, None)
        if entry is not None:
            self.contexts.finished(entry.key, request_id)
        return self._refused.pop(request_id, None)


def check_request(request: Any) -> None:
    """Raises RefusedRequest for what can't be computed behind a context."""
    sampling = request.sampling_params
    wrong = {
        "a pooling request has no context: generate text": sampling is None,
        NEEDS_PROMPT_LOGPROBS: sampling is not None and sampling.prompt_logprobs is not None,
        "a LoRA adapter is not served with a context: name the base model": request.lora_request is not None,
        HAS_MEDIA: bool(request.mm_features),
        HAS_EMBEDS: request.prompt_embeds is not None,
        "a request that is fed piece by piece is not served with a context: send it whole": request.resumable,
        "it reads no prefix cache, which holds the handle: leave skip_reading_prefix_cache out": request.prompt_embeds
        is None
        and request.skip_reading_prefix_cache,
    }
    for reason, is_wrong in wrong.items():
        if is_wrong:
            raise RefusedRequest(reason)


def salted(*parts: str | None) -> str:
    """One salt of several, which differs wherever one of them does."""
    return "|".join("-" if part is None else f"{len(part)}:{part}" for part in parts)


def rewrite(request: Any, ids: list[int], salt: str) -> None:
    """Give a request that was not scheduled yet another prompt [T] and another salt.

    By vLLM's own fields: the views of `all_token_ids` go on the same list, and the hashes are made anew.
    """
    request.prompt_token_ids, request.num_prompt_tokens = list(ids), len(ids)
    request._all_token_ids[:] = ids
    request.cache_salt = salt
    request.block_hashes.clear()
    request.update_block_hashes()
