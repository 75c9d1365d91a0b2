"""Two kinds of questions about one context (SCBench Mix.RepoQA+KV, arXiv 2412.10319)."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import chain

from kvzip.eval import metrics
from kvzip.eval.tasks.base import Question, Sample, TaskSettings, spread
from kvzip.eval.tasks.repoqa import GAP, Function, RepoQA
from kvzip.eval.tasks.retrieval import random_uuid

NUM_EACH = 4


class MixRepoQAKV(RepoQA):
    """Functions with a pair of UUIDs between any two; functions and values are asked for in turn, and judged apart."""

    name = "mix-repoqa-kv"
    source = "SCBench Mix.RepoQA+KV, arXiv 2412.10319; where the pairs stand is ours, the paper leaves it open"
    metric = "same_function, contains"
    num_questions = f"{NUM_EACH} of each kind"
    instruction = "Below are functions of a program, and pairs of a key and a value."
    num_asked = NUM_EACH

    def make(self, rng: random.Random, functions: list[Function], settings: TaskSettings) -> Sample:
        chosen = self.draw(rng, functions, settings, lambda code: _with_pair(code, _pair(random.Random(0))))
        pairs = [_pair(rng) for _ in chosen]
        blocks = [_with_pair(code, pair) for (code, _), pair in zip(chosen, pairs, strict=True)]
        code_questions = (replace(question, part="repoqa") for question in self.ask(rng, chosen))
        kv_questions = [
            Question(f'Key: "{key}"\nThe value associated with this key is:', (value,), "kv", 64)
            for key, value in (pairs[i] for i in spread(rng, len(pairs), NUM_EACH))
        ]
        return Sample(GAP.join(blocks), tuple(chain(*zip(code_questions, kv_questions, strict=True))))

    def score(self, prediction: str, question: Question) -> float:
        if question.part == "kv":
            return metrics.contains(prediction, question.golds)
        return super().score(prediction, question)


def _pair(rng: random.Random) -> tuple[str, str]:
    return random_uuid(rng), random_uuid(rng)


def _with_pair(code: str, pair: tuple[str, str]) -> str:
    return f'{code}{GAP}"{pair[0]}": "{pair[1]}"'
