"""What contexts bring on vLLM: memory, requests in flight, first tokens, decoding, and what answers lose."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from kvzip import store
from kvzip.bench.measure import paired, ratios, report, timed
from kvzip.bench.texts import bench_text
from kvzip.integrations.vllm.offline import Peaks, engine, generate, sampling, transfer_config
from kvzip.llm import LLM

BLOCK = 32
NUM_ASKED, NUM_NEW = 4, 32  # questions at once, tokens of each answer, where memory is measured
NUM_DECODING, NUM_DECODED = 8, 64  # questions over two contexts, and tokens of each answer, where speed is measured
NUM_DIFFERENT = 12  # contexts that differ, where requests in flight are counted
QUESTION = "What does the text say about number {}?"
USAGE, RUNNING = "vllm:kv_cache_usage_perc", "vllm:num_requests_running"
POOL = 2 << 30  # bytes of the KV pool
OPTIONS: dict[str, Any] = {
    "enforce_eager": True, "block_size": BLOCK, "max_num_seqs": 16, "kv_cache_memory_bytes": POOL,
}  # fmt: skip


@dataclass(frozen=True)
class Texts:
    """Contexts in a store.  prompts: by name, the ids of prefix and context.  asked: ids of questions."""

    store: Path
    prompts: dict[str, list[int]]
    asked: list[list[int]]

    def questions(self, count: int, names: Sequence[str], is_plain: bool) -> tuple[list[list[int]], list[str | None]]:
        """`count` prompts over these contexts in turn, and what they name: no context where the text itself is sent."""
        chosen = [names[i % len(names)] for i in range(count)]
        ids = [
            [*self.prompts[name], *asked] if is_plain else asked
            for name, asked in zip(chosen, self.asked, strict=False)
        ]
        return ids, [None if is_plain else name for name in chosen]


def bench_serve(llm: LLM, context_len: int, keep_ratio: float, num_runs: int, text_path: str | None) -> dict[str, Any]:
    """Contexts against plain prompts with a prefix cache, on the same engine, in turn.

    Figures: `blocks_ratio`, KV blocks of four questions at once over one context; `in_flight` and `plain_in_flight`,
    requests that run at a time in a pool that holds one plain prompt of that length, contexts that differ;
    `first_token_ratio`, seconds to the first token of a plain prompt over that of a stored context that no worker has
    open; `decode_ratio`, tokens a second of eight questions over two contexts of twice the length, against plain
    prompts with a warm prefix cache; `plugin_ratio`, seconds of plain prompts with the plugin over those of stock vLLM.
    """
    with tempfile.TemporaryDirectory() as folder:
        texts = _make_store(llm, Path(folder), context_len, keep_ratio, num_runs, text_path)
        figures = _with_room(llm, texts, num_runs) | _in_small_pool(llm, texts)
        figures |= _beside_stock(llm, texts, num_runs)
    return report("serve", llm, context_len, keep_ratio, text_path, figures)


def _make_store(
    llm: LLM, folder: Path, context_len: int, keep_ratio: float, num_runs: int, text_path: str | None
) -> Texts:
    """`once` of that length, `long0`, `long1` of twice it; `cold<i>`, `other<i>` are `once` as files of their own."""
    ids, prompts = llm.tokenize(bench_text(llm, 4 * context_len, text_path)), dict[str, list[int]]()
    parts = {"once": ids[:context_len], "long0": ids[: 2 * context_len], "long1": ids[2 * context_len :]}
    copies = [*(f"cold{i}" for i in range(num_runs + 1)), *(f"other{i}" for i in range(NUM_DIFFERENT))]
    for name, part in parts.items():
        data = llm.compress(llm.tokenizer.decode(part), keep_ratio=keep_ratio, certify=False).data
        store.write(folder / f"{name}.kvz", data)
        prompts[name] = [*llm.prefix_ids(), *data.context_ids.tolist()]
        for copy in copies if name == "once" else ():
            store.write(folder / f"{copy}.kvz", replace(data, info=replace(data.info, source=copy)))
            prompts[copy] = [*llm.tokenize(copy).tolist(), *prompts[name]]  # no block of it is another's
    asked = [llm.question_ids(QUESTION.format(number)) for number in range(max(NUM_DECODING, NUM_DIFFERENT))]
    return Texts(folder, prompts, asked)


def _folder(hf: LLM) -> str:
    return str(hf.model.config.name_or_path)


def _engine(hf: LLM, texts: Texts, **options: Any) -> AbstractContextManager[Any]:
    transfer = transfer_config(texts.store)
    return engine(_folder(hf), kv_transfer_config=transfer, dtype=hf.dtype_name, **OPTIONS, **options)


def _ask(llm: Any, texts: Texts, names: Sequence[str], count: int, num_new: int, is_plain: bool) -> None:
    ids, named = texts.questions(count, names, is_plain)
    generate(llm, ids, [sampling(name, num_new, ignore_eos=True) for name in named])


def _with_room(hf: LLM, texts: Texts, num_runs: int) -> dict[str, list[float]]:
    """Memory, first tokens and decoding in a pool that holds everything."""
    longest = max(map(len, texts.prompts.values())) + max(map(len, texts.asked)) + NUM_DECODED + BLOCK
    with _engine(hf, texts, max_model_len=longest) as llm:
        num_blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
        blocks = {}
        for is_plain in (True, False):
            llm.reset_prefix_cache()
            with Peaks(llm, USAGE) as peaks:
                _ask(llm, texts, ["once"], NUM_ASKED, NUM_NEW, is_plain)
            blocks[is_plain] = round(peaks.found[USAGE] * num_blocks)
        runs = {True: iter(range(num_runs + 1)), False: iter(range(num_runs + 1))}

        def first_token(is_plain: bool) -> float:
            name = f"cold{next(runs[is_plain])}"
            return timed(lambda: _ask(llm, texts, [name], 1, 1, is_plain))[0]

        def decode(is_plain: bool) -> float:
            work = lambda: _ask(llm, texts, ["long0", "long1"], NUM_DECODING, NUM_DECODED, is_plain)  # noqa: E731
            return timed(work)[0]

        first = paired(num_runs, {"plain": lambda: first_token(True), "stored": lambda: first_token(False)})
        decoding = paired(num_runs, {"plain": lambda: decode(True), "stored": lambda: decode(False)})
    return {
        "blocks": [float(blocks[False])],
        "plain_blocks": [float(blocks[True])],
        "blocks_ratio": [blocks[False] / blocks[True]],
        "first_token_s": first["stored"],
        "plain_first_token_s": first["plain"],
        "first_token_ratio": ratios(first["plain"], first["stored"]),
        "decode_s": decoding["stored"],
        "plain_decode_s": decoding["plain"],
        "decode_ratio": ratios(decoding["plain"], decoding["stored"]),
    }


def _in_small_pool(hf: LLM, texts: Texts) -> dict[str, list[float]]:
    """Requests in flight in a pool that holds one plain prompt and its answer."""
    names = [f"other{i}" for i in range(NUM_DIFFERENT)]
    longest = max(len(texts.prompts[name]) for name in names) + max(map(len, texts.asked)) + NUM_NEW
    num_blocks = 1 - -longest // BLOCK
    room = {"num_gpu_blocks_override": num_blocks, "max_model_len": (num_blocks - 1) * BLOCK}
    found = {}
    with _engine(hf, texts, **room) as llm:
        for is_plain, count in ((True, 2), (False, NUM_DIFFERENT)):
            with Peaks(llm, RUNNING) as peaks:
                _ask(llm, texts, names[:count], count, NUM_NEW, is_plain)
            found[is_plain] = peaks.found[RUNNING]
    return {
        "in_flight": [found[False]],
        "plain_in_flight": [found[True]],
        "in_flight_ratio": [found[False] / found[True]],
    }


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _beside_stock(hf: LLM, texts: Texts, num_runs: int) -> dict[str, list[float]]:
    """Plain prompts on an engine with contexts and on a stock one, both alive; again with the other one started first.

    Both compute on every core: left to itself vLLM sets cores aside, and of two cores one more without a connector.
    """
    longest = len(texts.prompts["once"]) + max(map(len, texts.asked)) + NUM_DECODED
    samples: dict[str, list[float]] = {"plugin": [], "stock": []}

    def plain(llm: Any) -> float:
        return timed(lambda: _ask(llm, texts, ["once"], NUM_ASKED, NUM_DECODED, True))[0]

    for names in (("plugin", "stock"), ("stock", "plugin")):
        with ExitStack() as stack:
            engines = {}
            for name in names:
                if name == "plugin":
                    starting, without = _engine(hf, texts, max_model_len=longest), {}
                else:
                    starting = engine(_folder(hf), max_model_len=longest, dtype=hf.dtype_name, **OPTIONS)
                    without = {"VLLM_PLUGINS": ""}
                with _environment(VLLM_CPU_NUM_OF_RESERVED_CPU="0", **without):  # while it starts, not for the next one
                    engines[name] = stack.enter_context(starting)
            works: dict[str, Callable[[], float]] = {name: partial(plain, llm) for name, llm in engines.items()}
            for name, found in paired(num_runs, works).items():
                samples[name] += found
    return {
        "plugin_plain_s": samples["plugin"],
        "stock_plain_s": samples["stock"],
        "plugin_ratio": ratios(samples["plugin"], samples["stock"]),
    }
