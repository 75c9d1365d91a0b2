"""An engine of vLLM in this program, with contexts: for measurements and for batches of questions."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvzip.integrations.vllm import PARAMETER, check_version

CONNECTOR = {
    "kv_connector": "KVZipConnector",
    "kv_connector_module_path": "kvzip.integrations.vllm.connector",
    "kv_role": "kv_consumer",
}
SAMPLED_EVERY = 0.005  # seconds


def transfer_config(store: Path, **options: Any) -> dict[str, Any]:
    """What `kv_transfer_config` has to be.  options: of `KVZipConnector`, besides the store."""
    return {**CONNECTOR, "kv_connector_extra_config": {"store": str(store), **options}}


@contextmanager
def engine(model: str, **options: Any) -> Iterator[Any]:
    """A `vllm.LLM` that keeps count of what it does; it is shut down afterwards.

    model: folder or hub id.  options: of `vllm.LLM`; it serves contexts with
    `kv_transfer_config=transfer_config(store)`.  Raises MissingExtraError or ModelError.
    """
    check_version()
    from vllm import LLM

    llm = LLM(model=model, disable_log_stats=False, **options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def sampling(context: str | None, max_tokens: int, mode: str = "raw", **options: Any) -> Any:
    """Greedy `SamplingParams` that name a context, or none.  mode: see `kvzip.integrations.vllm.prompts`."""
    from vllm import SamplingParams

    named = {} if context is None else {"extra_args": {"kv_transfer_params": {PARAMETER: context, "as": mode}}}
    return SamplingParams(temperature=0, max_tokens=max_tokens, **named, **options)


def generate(llm: Any, prompts: Sequence[Sequence[int]], params: Sequence[Any]) -> list[Any]:
    """The outputs of prompts of ids, all at once, in order."""
    given = [{"prompt_token_ids": list(ids)} for ids in prompts]
    return [found.outputs[0] for found in llm.generate(given, list(params), use_tqdm=False)]


class Peaks:
    """The largest values of gauges of an engine while a block runs.  names: as in its metrics."""

    def __init__(self, llm: Any, *names: str) -> None:
        self.llm, self.found = llm, dict.fromkeys(names, 0.0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peaks:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.is_set():
            for metric in self.llm.get_metrics():
                if metric.name in self.found:
                    self.found[metric.name] = max(self.found[metric.name], float(metric.value))
            time.sleep(SAMPLED_EVERY)
