"""What the scheduler's side of the plugin says and does, with requests that have vLLM's fields. Needs no vLLM."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from random_context import Shape, random_context
from tiny import tiny_tokenizer

from kvzip import store
from kvzip.hf.prompts import Prompts
from kvzip.integrations.vllm import request as request_body
from kvzip.integrations.vllm.library import Entry, Library, RefusedRequest, checked_name
from kvzip.integrations.vllm.loading import places_of
from kvzip.integrations.vllm.prompts import MODES, Questions

BLOCK, MAX_LEN, MAX_POSITIONS = 4, 64, 100


@pytest.fixture(scope="module", autouse=True)
def bases() -> Any:
    """Where there is no vLLM, empty classes in place of its message bases."""
    name = "vllm.distributed.kv_transfer.kv_connector.v1.base"
    try:
        import vllm  # noqa: F401
    except ImportError:
        made = {".".join(name.split(".")[: i + 1]): ModuleType("x") for i in range(len(name.split(".")))}
        for base in ("KVConnectorMetadata", "KVConnectorWorkerMetadata"):
            setattr(made[name], base, type(base, (), {}))
        sys.modules.update(made)
        yield
        for module in [*made, *(m for m in sys.modules if m.startswith("kvzip.integrations.vllm."))]:
            sys.modules.pop(module, None)
    else:
        yield


@dataclass
class FakeRequest:
    """The fields of vLLM's Request that are read or written."""

    request_id: str
    prompt_token_ids: list[int]
    kv_transfer_params: Any
    max_tokens: int = 8
    cache_salt: str | None = None
    skip_reading_prefix_cache: bool = False
    sampling_params: Any = field(default_factory=lambda: SimpleNamespace(prompt_logprobs=None))
    lora_request: Any = None
    mm_features: Any = ()
    prompt_embeds: Any = None
    resumable: bool = False

    def __post_init__(self) -> None:
        self._all_token_ids = list(self.prompt_token_ids)
        self.num_prompt_tokens, self.block_hashes = len(self.prompt_token_ids), [1]

    def update_block_hashes(self) -> None:
        self.block_hashes.append(hash((self.cache_salt, *self._all_token_ids)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate("abc"):
        store.write(tmp_path / f"{name}.kvz", random_context(Shape(), seed=seed)[0])
    return tmp_path


FINGERPRINT = "TinyForCausalLM:0123456789abcdef01234567"


def scheduling(folder: Path, limit: int = 1 << 20, workers: int = 1) -> Any:
    from kvzip.integrations.vllm.room import Room
    from kvzip.integrations.vllm.scheduling import Contexts, Scheduling

    questions = Questions(Prompts(tiny_tokenizer()))
    return Scheduling(
        Library(folder, FINGERPRINT), questions, Contexts(limit, workers), Room(BLOCK, MAX_LEN, MAX_POSITIONS)
    )


def asks(name: object, number: int = 0, **fields: Any) -> FakeRequest:
    params = {"kvzip": name, "as": fields.pop("mode", "raw")}
    return FakeRequest(f"r{number}", fields.pop("ids", [9, 10, 11]), params, **fields)


def opened(side: Any) -> None:
    """The workers answer what they were asked to open."""
    from kvzip.integrations.vllm.messages import Reports

    side.answered(Reports([(key, "") for key, _ in side.take_step().opened]))


def test_a_request_waits_until_its_context_is_open_and_then_claims_a_handle(folder: Path) -> None:
    side, request = scheduling(folder), asks("a")
    assert side.arrived(request) is None
    assert len(request.prompt_token_ids) == BLOCK + 3 and request.prompt_token_ids[BLOCK:] == [9, 10, 11]
    assert request._all_token_ids == request.prompt_token_ids and request.num_prompt_tokens == BLOCK + 3
    assert side.num_claimed(request, 0) == (None, False)
    opened(side)
    assert side.num_claimed(request, 0) == (BLOCK, False)
    side.placed(request, ([5, 6], [7, 8]), BLOCK)
    key = store.read_info(folder / "a.kvz").sha256
    assert sorted(side.take_step().handles) == [(5, key), (7, key)]
    warm = asks("a", 1)
    side.arrived(warm)
    assert warm.cache_salt == request.cache_salt and side.num_claimed(warm, BLOCK) == (0, False)
    side.placed(warm, ([5, 9], [7, 10]), 0)
    assert not side.take_step().handles


def test_a_plain_request_takes_a_handle_block_back(folder: Path) -> None:
    side, request = scheduling(folder), asks("a")
    side.arrived(request)
    side.num_claimed(request, 0)
    opened(side)
    side.num_claimed(request, 0)
    side.placed(request, ([5, 6],), BLOCK)
    side.take_step()
    plain = FakeRequest("plain", [1, 2], None)
    assert side.arrived(plain) is None and side.num_claimed(plain, 0) == (0, False)
    side.placed(plain, ([6, 5],), 0)  # in another place it is no handle
    assert not side.take_step().handles
    side.placed(plain, ([5],), 0)
    assert side.take_step().handles == [(5, None)]


def test_salts_keep_contexts_callers_and_plain_prompts_apart(folder: Path) -> None:
    side, salts = scheduling(folder), set()
    for number, (name, salt) in enumerate([("a", None), ("a", "x"), ("b", None), ("b", "x"), ("a", "-"), ("c", "1:x")]):
        request = asks(name, number, cache_salt=salt)
        assert side.arrived(request) is None
        salts.add(request.cache_salt)
    other = scheduling(folder)
    request = asks("a", 9)
    other.arrived(request)
    assert len({*salts, request.cache_salt}) == 7  # nor do engines share one, so no caller can name a handle
    plain = FakeRequest("plain", [1], None, cache_salt="x")
    side.arrived(plain)
    assert plain.cache_salt == "x" and plain.prompt_token_ids == [1]


REFUSED = {
    "no such file": (asks("nothing"), "no context 'nothing'"),
    "a name that climbs": (asks("../a"), "no name of a context"),
    "a hidden name": (asks(".a"), "no name of a context"),
    "a number": (asks(7), "expected a string"),
    "an unknown mode": (asks("a", mode="poem"), "allowed: chat, question, raw"),
    "no question": (asks("a", ids=[]), "empty"),
    "prompt_logprobs": (asks("a", sampling_params=SimpleNamespace(prompt_logprobs=1)), "prompt_logprobs"),
    "pooling": (asks("a", sampling_params=None), "pooling"),
    "LoRA": (asks("a", lora_request=object()), "LoRA"),
    "images": (asks("a", mm_features=[1]), "images"),
    "embeddings": (asks("a", prompt_embeds=object()), "embeddings"),
    "pieces": (asks("a", resumable=True), "piece by piece"),
    "no prefix cache": (asks("a", skip_reading_prefix_cache=True), "prefix cache"),
    "too long an answer": (asks("a", max_tokens=60), "ask for at most"),
    "a chat with a system message": (asks("a", mode="chat"), "does not open as"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_requests_claim_a_token_that_never_comes(case: str, folder: Path) -> None:
    wrong, reason = REFUSED[case]
    wrong = replace(wrong)
    side = scheduling(folder)
    assert reason in side.arrived(wrong)
    assert "\n" not in side._refused[wrong.request_id]
    assert side.num_claimed(wrong, 0) == (1, True) and not wrong.skip_reading_prefix_cache
    side.placed(wrong, ([3],), 1)
    assert side.take_step().refused == [wrong.request_id]
    assert side.left(wrong.request_id) is not None and side.left(wrong.request_id) is None
    good = asks("a", 5)
    assert side.arrived(good) is None


def test_a_damaged_or_foreign_file_is_refused_and_served_once_it_is_whole(folder: Path) -> None:
    whole = (folder / "a.kvz").read_bytes()
    side = scheduling(folder)
    (folder / "a.kvz").write_bytes(whole[:200])
    assert "can't use" in side.arrived(asks("a"))
    (folder / "a.kvz").write_bytes(whole)
    assert side.arrived(asks("a", 1)) is None
    other = random_context(Shape())[0]
    store.write(folder / "d.kvz", replace(other, info=replace(other.info, fingerprint="Other:1")))
    assert "ask a server of its model" in side.arrived(asks("d", 2))


def test_what_workers_can_not_open_is_refused(folder: Path) -> None:
    from kvzip.integrations.vllm.messages import Reports

    side, request = scheduling(folder, workers=2), asks("a")
    side.arrived(request)
    side.num_claimed(request, 0)
    ((key, _),) = side.take_step().opened
    side.answered(Reports([(key, "")]).aggregate(Reports([(key, "it is damaged")])))
    assert side.take_step().closed == [key]  # the other worker has it
    assert side.num_claimed(request, 0) == (1, True) and "damaged" in side.left("r0")


def test_the_least_recently_used_make_room(folder: Path) -> None:
    size = max(store.read_info(folder / f"{name}.kvz").kv_nbytes for name in "abc")
    side, keys = scheduling(folder, limit=2 * size), {n: store.read_info(folder / f"{n}.kvz").sha256 for n in "abc"}
    for number, name in enumerate("aba"):
        request = asks(name, number)
        side.arrived(request)
        side.num_claimed(request, 0)
        opened(side)
        assert side.num_claimed(request, 0) == (BLOCK, False)
        if name != "a" or number:
            side.left(request.request_id)
    third = asks("c", 7)
    side.arrived(third)
    assert side.num_claimed(third, 0) == (None, False)
    step = side.take_step()
    assert step.closed == [keys["b"]] and [key for key, _ in step.opened] == [keys["c"]]  # r0 still asks a
    fourth = asks("b", 8)
    side.arrived(fourth)
    assert side.num_claimed(fourth, 0) == (None, False) and not side.take_step().opened  # both are in use
    side.left("r0")
    assert side.num_claimed(fourth, 0) == (None, False) and side.take_step().closed == [keys["a"]]
    small = scheduling(folder, limit=10)
    request = asks("a", 9)
    small.arrived(request)
    assert small.num_claimed(request, 0) == (1, True) and "more than the 10" in small.left("r9")


def test_an_answer_without_a_limit_gets_what_fits(folder: Path) -> None:
    side = scheduling(folder)
    request = asks("a", max_tokens=MAX_LEN - 3)  # as vLLM fills it in
    side.arrived(request)
    assert request.max_tokens == MAX_LEN - BLOCK - 3
    from kvzip.integrations.vllm.room import Room

    entry = Entry("a", Path("a"), "k", 90, 1)
    assert Room(BLOCK, MAX_LEN, MAX_POSITIONS).max_new_tokens(entry, 3, MAX_LEN, 3) == 7  # true positions
    with pytest.raises(RefusedRequest, match="at most 0"):
        Room(BLOCK, MAX_LEN, MAX_POSITIONS).max_new_tokens(replace(entry, logical_len=99), 3, MAX_LEN, 3)


def test_modes_put_the_same_tokens_behind_a_context() -> None:
    prompts = Prompts(tiny_tokenizer())
    questions, text = Questions(prompts), "Who runs?"
    wanted = prompts.question_ids(text)
    chat = prompts.tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False, enable_thinking=False
    )
    assert questions.behind_context(chat, "chat") == wanted
    assert questions.behind_context(prompts.text_ids(text), "question") == wanted
    assert questions.behind_context([prompts.tokenizer.bos_token_id, *prompts.text_ids(text)], "question") == wanted
    assert questions.behind_context(wanted, "raw") == wanted
    assert set(MODES) == {"chat", "question", "raw"}


def test_names() -> None:
    for good in ("a", "a.kvz", "x/y", "ünï"):
        assert checked_name(good) == good
    for bad in ("", "/a", "a/", "a//b", "./a", "a/../b", "a\0b", "x" * 256, None, 3, ["a"]):
        with pytest.raises(RefusedRequest):
            checked_name(bad)


def test_the_body_of_a_request() -> None:
    body = request_body("treaty", "Who?", model="m", stream=True)
    assert body["kv_transfer_params"] == {"kvzip": "treaty"} and body["messages"][0]["content"] == "Who?"
    assert body["model"] == "m" and body["stream"]
    assert request_body(Path("/x/treaty.kvz").absolute(), "Who?")["kv_transfer_params"] == {"kvzip": "treaty"}


def test_slots_of_a_portable_context_go_to_their_places() -> None:
    rows, places = places_of([3, 0, 7, 2], 2, 14, 4)
    assert rows.tolist() == [0, 1, 6, 7, 8, 9, 10, 11]  # those of the null block are left out
    assert places.tolist() == [14, 15, 28, 29, 30, 31, 8, 9]
    assert torch.equal(places_of([1], 0, 0, 4)[0], torch.empty(0, dtype=torch.int64))


def test_a_portable_context_is_loaded_from_the_first_slot_that_is_not_cached(folder: Path) -> None:
    side, request = scheduling(folder), asks("a")
    side.library.find = lambda name: Entry("p", folder / "p.kvp", "key", 14, 100, num_slots=10)
    side.arrived(request)
    assert len(request.prompt_token_ids) == 13
    side.num_claimed(request, 0)
    opened(side)
    assert side.num_claimed(request, 8) == (2, False)
    side.placed(request, ([5, 6, 7, 8],), 2)
    step = side.take_step()
    assert not step.handles and [(x.key, x.start, x.stop, x.blocks) for x in step.loads] == [
        ("key", 8, 10, ((5, 6, 7, 8),))
    ]
