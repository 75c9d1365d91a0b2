"""Tasks by name. An entry is a lazy string, so that nothing is imported before it is used."""

from __future__ import annotations

from kvzip.eval.tasks.base import Task
from kvzip.parts import named

TASKS = {
    "retr-kv": "kvzip.eval.tasks.retrieval:RetrKV",
    "retr-prefix-suffix": "kvzip.eval.tasks.retrieval:RetrPrefixSuffix",
    "retr-multihop": "kvzip.eval.tasks.tracking:RetrMultiHop",
    "math-find": "kvzip.eval.tasks.numbers:MathFind",
    "icl-many-shot": "kvzip.eval.tasks.many_shot:ManyShot",
    "repoqa": "kvzip.eval.tasks.repoqa:RepoQA",
    "mix-repoqa-kv": "kvzip.eval.tasks.mix:MixRepoQAKV",
    "niah": "kvzip.eval.tasks.needle:Needle",
    "ruler-multikey": "kvzip.eval.tasks.ruler:MultiKey",
    "ruler-vt": "kvzip.eval.tasks.ruler:VariableTracking",
    "ruler-fwe": "kvzip.eval.tasks.ruler:FrequentWords",
    "ruler-cwe": "kvzip.eval.tasks.ruler:CommonWords",
    "squad": "kvzip.eval.tasks.squad:Squad",
    "gsm8k": "kvzip.eval.tasks.gsm8k:GSM8K",
    "text": "kvzip.eval.tasks.text:Text",
    "scbench-kv": "kvzip.eval.tasks.scbench:KV",
    "scbench-prefix-suffix": "kvzip.eval.tasks.scbench:PREFIX_SUFFIX",
    "scbench-vt": "kvzip.eval.tasks.scbench:VT",
    "scbench-repoqa": "kvzip.eval.tasks.scbench:REPOQA",
    "scbench-qa-eng": "kvzip.eval.tasks.scbench:QA_ENG",
    "scbench-qa-chn": "kvzip.eval.tasks.scbench:QA_CHN",
    "scbench-choice-eng": "kvzip.eval.tasks.scbench:CHOICE_ENG",
    "scbench-mf": "kvzip.eval.tasks.scbench:MF",
    "scbench-many-shot": "kvzip.eval.tasks.scbench:MANY_SHOT",
    "scbench-summary": "kvzip.eval.tasks.scbench:SUMMARY",
    "scbench-summary-with-needles": "kvzip.eval.tasks.scbench:SUMMARY_WITH_NEEDLES",
    "scbench-repoqa-and-kv": "kvzip.eval.tasks.scbench:REPOQA_AND_KV",
}


def get_task(name: str) -> Task:
    """The task of that name. Raises UnknownNameError."""
    task: Task = named("task", name, TASKS)()
    return task
