"""Tasks by name. An entry is a lazy string, so that nothing is imported before it is used."""

from __future__ import annotations

from importlib import import_module

from kvzip.errors import UnknownNameError
from kvzip.eval.tasks.base import Task

TASKS = {
    "retr-kv": "kvzip.eval.tasks.retrieval:RetrKV",
    "retr-prefix-suffix": "kvzip.eval.tasks.retrieval:RetrPrefixSuffix",
    "retr-multihop": "kvzip.eval.tasks.tracking:RetrMultiHop",
    "math-find": "kvzip.eval.tasks.numbers:MathFind",
    "niah": "kvzip.eval.tasks.needle:Needle",
    "gsm8k": "kvzip.eval.tasks.gsm8k:GSM8K",
    "squad": "kvzip.eval.tasks.squad:Squad",
}


def get_task(name: str) -> Task:
    """The task of that name. Raises UnknownNameError."""
    if name not in TASKS:
        raise UnknownNameError.of("task", name, TASKS)
    module, cls = TASKS[name].split(":")
    task: Task = getattr(import_module(module), cls)()
    return task
