"""`kvzip serve` as users meet it: a real server, the official client, files that change under it, an end without traces."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_real

import kvzip
from kvzip.integrations.vllm import extra_body
from kvzip.integrations.vllm.serve import check_port

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")
openai = pytest.importorskip("openai")
psutil = pytest.importorskip("psutil")

pytestmark = pytest.mark.real

MODEL, KEY = "smollm2-135m", "YOUR_KEY"  # the key as the printed usage has it, so that it can be run as it is
NEW_TOKENS, CONTEXT_LEN, MAX_MODEL_LEN = 12, 300, 2048
START_S = 600
ROOT = Path(kvzip.__file__).parents[1]
FLAGS = ("--enforce-eager", "--max-model-len", str(MAX_MODEL_LEN), "--api-key", KEY)


@dataclass(frozen=True)
class Asked:
    """A question to a context, and the ids that `kvzip ask` answers."""

    context: str
    question: str
    ids: list[int]
    text: str


@dataclass(frozen=True)
class Made:
    """Contexts `a`, `b`, `c`: files outside any store, and what is asked of them."""

    folder: Path
    asked: dict[str, list[Asked]]
    plain: list[int]  # to PLAIN, without a context
    too_long: str  # as a prompt it fits, behind a context with its handle it does not

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.kvz"


PLAIN = "Name three colours."


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, articles: list[dict]) -> Made:
    llm, folder, asked = load_real(MODEL), tmp_path_factory.mktemp("made"), dict[str, list[Asked]]()
    for name, article in zip("abc", articles, strict=False):
        text = llm.tokenizer.decode(llm.tokenize(article["text"])[:CONTEXT_LEN])
        context = llm.compress(text, keep_ratio=0.4, certify=False)
        context.save(folder / f"{name}.kvz")
        questions = [question.strip() for question, _ in article["questions"][: 4 if name != "c" else 1]]
        answers = [context.ask(question, max_new_tokens=NEW_TOKENS) for question in questions]
        asked[name] = [Asked(name, q, list(a.token_ids), str(a)) for q, a in zip(questions, answers, strict=True)]
    ids = chat_ids(llm, PLAIN)
    with torch.inference_mode():
        out = llm.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
    num_words = MAX_MODEL_LEN - 2 - chat_ids(llm, "").shape[1]
    too_long = " ".join(num_words * ["word"])
    assert chat_ids(llm, too_long).shape[1] == MAX_MODEL_LEN - 2
    return Made(folder, asked, out[0, ids.shape[1] :].tolist(), too_long)


def chat_ids(llm: kvzip.LLM, content: str) -> torch.Tensor:
    """[1, T], as vLLM renders it."""
    messages = [{"role": "user", "content": content}]
    text = llm.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return torch.tensor([llm.prompts.template_ids(text)])


@dataclass
class Server:
    """A `kvzip serve` that answers.  output: what it printed."""

    store: Path
    port: int
    process: subprocess.Popen
    log: Path
    members: list[Any] = field(default_factory=list)

    @property
    def client(self) -> Any:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=KEY, max_retries=0, timeout=300)

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def chat(self, context: str | None, question: str, **fields: Any) -> Any:
        named = extra_body(context) if context else {}
        return self.client.chat.completions.create(
            **{"model": MODEL, "messages": [{"role": "user", "content": question}], "max_tokens": NEW_TOKENS, **fields},
            temperature=0,
            extra_body={**named, "return_token_ids": True, **fields.pop("body", {})},
        )

    def ids(self, context: str | None, question: str) -> list[int]:
        return list(self.chat(context, question).choices[0].token_ids)

    def outcome(self, context: str, question: str) -> list[int] | int:
        """The ids of the answer, or the status of the error."""
        try:
            return self.ids(context, question)
        except openai.APIStatusError as error:
            return int(error.status_code)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(store: Path, log: Path) -> Iterator[Server]:
    """A server of a store; it is ended by SIGTERM where a test did not."""
    port = free_port()
    words = [sys.executable, "-m", "kvzip", "serve", MODEL, "--store", str(store), "--port", str(port), "--", *FLAGS]
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    limits = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0"}
    with log.open("wb") as file:
        process = subprocess.Popen(
            words, stdout=file, stderr=file, env={**os.environ, **limits, **own}, cwd=store.parent,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background ignore it
        )  # fmt: skip
    server = Server(store, port, process, log)
    try:
        end = time.monotonic() + START_S
        while "print(answer" not in server.output:
            assert process.poll() is None and time.monotonic() < end, server.output[-4000:]
            time.sleep(0.5)
        server.members = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        yield server
    finally:
        process.terminate()
        process.wait(timeout=60)


@pytest.fixture(scope="module")
def server(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    store = folder / "store"
    store.mkdir()
    for name in "ab":
        shutil.copy(made.path(name), store)
    (store / "cut.kvz").write_bytes(made.path("c").read_bytes()[:3000])
    with serving(store, folder / "log") as running:
        yield running


# ---- answers


def test_it_says_what_it_serves(server: Server) -> None:
    assert f"kvzip: 2 contexts in {server.store} for {MODEL}" in server.output
    assert "kvzip: cut can't be asked: can't use context 'cut': it is cut short" in server.output


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_the_printed_words_can_be_pasted(server: Server) -> None:
    shown = server.output
    curl = shown[shown.index("\ncurl ") : shown.index("\n\nIn Python")]
    done = subprocess.run(["sh", "-c", curl], capture_output=True, text=True, timeout=120)
    assert '"chat.completion"' in done.stdout, done
    code = shown[shown.index("from openai") : shown.index("print(answer")] + "print(answer.choices[0].message.content)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and len(done.stdout) > 5, done


def test_chat_stream_and_completions(server: Server, made: Made) -> None:
    one = made.asked["a"][0]
    assert server.ids("a", one.question) == one.ids
    pieces = server.client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": one.question}], max_tokens=NEW_TOKENS, temperature=0,
        stream=True, extra_body=extra_body("a"),
    )  # fmt: skip
    told = [piece.choices[0].delta.content or "" for piece in pieces if piece.choices]
    assert "".join(told).strip() == one.text.strip() and len(told) > 3
    questions = [asked.question for asked in made.asked["a"][:2]]
    found = server.client.completions.create(
        model=MODEL, prompt=questions, max_tokens=NEW_TOKENS, temperature=0,
        extra_body={**extra_body("a", "question"), "return_token_ids": True},
    )  # fmt: skip
    assert [choice.token_ids for choice in found.choices] == [asked.ids for asked in made.asked["a"][:2]]


def test_without_a_context_it_is_vllm(server: Server, made: Made) -> None:
    assert server.ids(None, PLAIN) == made.plain
    found = server.client.completions.create(model=MODEL, prompt="Two and two is", max_tokens=4, temperature=0)
    assert found.choices[0].text


def at_once(server: Server, jobs: list[Asked]) -> list[list[int]]:
    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(lambda job: server.ids(job.context, job.question), jobs))


def test_eight_at_once_over_two_contexts(server: Server, made: Made) -> None:
    jobs = [asked for both in zip(made.asked["a"], made.asked["b"], strict=True) for asked in both]
    assert len(jobs) == 8 and len({tuple(job.ids) for job in jobs}) > 4
    assert at_once(server, jobs) == [job.ids for job in jobs]


# ---- refusals


def refused(server: Server, status: int, words: str, **fields: Any) -> Callable[[], None]:
    """A request that gets this status, with these words."""
    context, body = fields.pop("context", "a"), fields.pop("body", {})
    messages = [{"role": "user", "content": "Who?"}]

    def ask() -> None:
        with pytest.raises(openai.APIStatusError) as caught:
            server.client.chat.completions.create(
                **{"model": MODEL, "messages": messages, **fields}, extra_body={**extra_body(context), **body}
            )
        assert caught.value.status_code == status and words in caught.value.message, caught.value.message

    return ask


def test_each_refusal_has_its_reason_and_good_requests_stay_right(server: Server, made: Made) -> None:
    damaged = bytearray(made.path("c").read_bytes())
    damaged[-100] ^= 1
    (server.store / "damaged.kvz").write_bytes(damaged)
    wrong = [
        refused(server, 404, "no context 'none' in the store", context="none"),
        refused(server, 404, "no context 'none' in the store", context="none", stream=True),
        refused(server, 400, "is no name of a context", context="../made/a"),
        refused(server, 400, "it is cut short", context="cut"),
        refused(server, 400, "allowed: chat, question, raw", body=extra_body("a", "poem")),
        refused(server, 400, "echo", body={"echo": True}),
        refused(server, 400, "prompt_logprobs", body={"prompt_logprobs": 1}),
        refused(server, 400, "leave out the system message", messages=[{"role": "system", "content": "Be brief."}]),
        refused(server, 400, "don't fit", messages=[{"role": "user", "content": made.too_long}], max_tokens=1),
        refused(server, 500, "Internal server error", context="damaged"),  # what only the engine finds; the log has why
    ]
    jobs = made.asked["a"][:2] + made.asked["b"][:2]
    with ThreadPoolExecutor(len(wrong) + 1) as pool:
        good = pool.submit(at_once, server, jobs)
        for done in [pool.submit(ask) for ask in wrong]:
            done.result()
        assert good.result() == [job.ids for job in jobs]
    assert "damaged" in server.output and "does not match its contents" in server.output


def test_without_the_key_nobody_learns_what_is_in_the_store(server: Server) -> None:
    stranger = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="other", max_retries=0)
    for context in ("a", "none"):
        with pytest.raises(openai.AuthenticationError):
            stranger.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "Who?"}], extra_body=extra_body(context)
            )


# ---- files that change


def test_a_file_that_comes_while_it_runs(server: Server, made: Made) -> None:
    """Seen half written, it is refused; whole, it is served; gone, it is unknown."""
    one, path, content = made.asked["c"][0], server.store / "late.kvz", made.path("c").read_bytes()
    assert server.outcome("late", one.question) == 404
    for share in (0.01, 0.5, 0.999):
        path.write_bytes(content[: int(len(content) * share)])
        assert server.outcome("late", one.question) in (400, 500)
    path.write_bytes(content)
    assert server.outcome("late", one.question) == one.ids
    path.unlink()
    assert server.outcome("late", one.question) == 404


def by_rename(path: Path, content: bytes) -> None:
    path.with_suffix(".new").write_bytes(content)
    path.with_suffix(".new").replace(path)


def in_place(path: Path, content: bytes) -> None:
    """As `cp` does, slowly."""
    with path.open("r+b" if path.exists() else "wb") as file:
        for start in range(0, len(content), 1 + len(content) // 4):
            file.write(content[start : start + 1 + len(content) // 4])
            file.flush()
            time.sleep(0.05)
        file.truncate()


@pytest.mark.parametrize("put", [by_rename, in_place])
def test_a_file_that_is_replaced_gives_no_wrong_answer(
    put: Callable[[Path, bytes], None], server: Server, made: Made
) -> None:
    """Asked all the time while it is one context, then another: each answer is that of one of them, or an error."""
    path, contents = server.store / f"{put.__name__}.kvz", {n: made.path(n).read_bytes() for n in "ab"}
    question = made.asked["a"][0].question
    put(path, contents["b"])
    right = {"a": made.asked["a"][0].ids, "b": server.ids(path.stem, question)}
    assert right["a"] != right["b"] and right["b"] == server.ids("b", question)
    seen: list[list[int] | int] = []
    is_over = threading.Event()

    def keep_asking() -> None:
        while not is_over.is_set():
            seen.append(server.outcome(path.stem, question))

    asking = [threading.Thread(target=keep_asking) for _ in range(2)]
    for thread in asking:
        thread.start()
    for name in "aba":
        put(path, contents[name])
        num_before, end = len(seen), time.monotonic() + 60
        while len(seen) < num_before + 3 and time.monotonic() < end:  # one of them at least began after this change
            time.sleep(0.05)
    is_over.set()
    for thread in asking:
        thread.join()
    assert len(seen) >= 9 and all(found in (400, 500) or found in right.values() for found in seen), seen
    for name in "ab":
        put(path, contents[name])
        assert server.ids(path.stem, question) == right[name]


def test_a_file_that_is_deleted_under_its_readers(server: Server, made: Made) -> None:
    path, jobs = server.store / "doomed.kvz", [Asked("doomed", a.question, a.ids, a.text) for a in made.asked["a"]]
    shutil.copy(made.path("a"), path)
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(server.outcome, job.context, job.question) for job in jobs]
        time.sleep(0.3)
        path.unlink()
        found = [one.result() for one in running]
    assert all(one in (404, 500) or one == job.ids for one, job in zip(found, jobs, strict=True)), found
    assert server.outcome("doomed", jobs[0].question) == 404


# ---- several servers, and the end


def test_two_servers_of_one_folder(server: Server, made: Made, tmp_path: Path) -> None:
    one = made.asked["c"][0]
    with serving(server.store, tmp_path / "log") as second:
        shutil.copy(made.path("c"), server.store / "both.kvz")
        assert [each.ids("both", one.question) for each in (server, second)] == [one.ids, one.ids]
        second.process.send_signal(signal.SIGINT)
        assert second.process.wait(timeout=60) == 130
        assert not alive(second)
    assert server.ids("both", one.question) == one.ids


def alive(server: Server) -> list[str]:
    """Its processes that still run."""
    running = [member for member in server.members if member.is_running() and member.status() != psutil.STATUS_ZOMBIE]
    return [str(member) for member in running]


def test_nothing_is_left_when_it_is_told_to_stop(server: Server) -> None:
    assert len(alive(server)) >= 3  # ours, the API server, the engine
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(timeout=60) == 143
    assert not alive(server)
    check_port("127.0.0.1", server.port)
