"""Two kinds of questions about one context (SCBench Mix.RepoQA+KV, arXiv 2412.10319)."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import chain, zip_longest

from kvzip.eval.tasks.base import Question, Sample, TaskSettings, judge, spread
from kvzip.eval.tasks.repoqa import GAP, Function, RepoQA
from kvzip.eval.tasks.retrieval import ANSWER_LEN, random_uuid

NUM_EACH = 4


class MixRepoQAKV(RepoQA):
    """Functions and, evenly between them, pairs of UUIDs; both are asked for in turn, and judged apart."""

    name = "mix-repoqa-kv"
    source = "SCBench Mix.RepoQA+KV, arXiv 2412.10319; where the pairs stand is ours, the paper leaves it open"
    metric = "same_function, contains"
    num_questions = f"{NUM_EACH} of each kind"
    instruction = "Below are functions of a program, and pairs of a key and a value."
    num_asked = NUM_EACH
    version = 2

    def make(self, rng: random.Random, functions: dict[Function, int], settings: TaskSettings) -> Sample:
        pairs = [(random_uuid(rng), random_uuid(rng)) for _ in range(num_pairs(settings.context_len))]
        lines = [f'"{key}": "{value}"' for key, value in pairs]
        left = settings.context_len - settings.count_tokens(GAP.join(lines))
        chosen = self.draw(rng, functions, left)
        blocks: list[str] = []
        for i, (code, _) in enumerate(chosen):
            blocks += [code, *lines[len(lines) * i // len(chosen) : len(lines) * (i + 1) // len(chosen)]]
        code_questions = [replace(question, part="repoqa") for question in self.ask(rng, chosen)]
        kv_questions = [
            Question(f'Key: "{key}"\nThe value associated with this key is:', (value,), "kv", ANSWER_LEN)
            for key, value in (pairs[i] for i in spread(rng, len(pairs), NUM_EACH))
        ]
        in_turn = chain.from_iterable(zip_longest(code_questions, kv_questions))
        return Sample(GAP.join(blocks), tuple(question for question in in_turn if question))

    def score(self, prediction: str, question: Question) -> float:
        return judge("contains" if question.part == "kv" else "same_function", prediction, question.golds)


def num_pairs(context_len: int) -> int:
    """100 pairs in 68,000 tokens, as in the paper; at least 8."""
    return max(8, min(100, context_len // 680))
