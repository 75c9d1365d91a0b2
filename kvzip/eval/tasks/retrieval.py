"""Exact retrieval of random strings (SCBench Retr.KV and Retr.Prefix-Suffix, arXiv 2412.10319)."""

from __future__ import annotations

import random
import string
import uuid

from kvzip.eval.tasks.base import GeneratedTask, Question, Sample, spread

NUM_QUESTIONS = 5
ANSWER_LEN = 96  # tokens of a sentence that says a key again and its value, as chat models do


class RetrKV(GeneratedTask):
    """A JSON object of UUIDs; the value of a key is asked for."""

    name = "retr-kv"
    source = "SCBench Retr.KV, arXiv 2412.10319"
    metric = "contains"
    num_questions = str(NUM_QUESTIONS)
    instruction = "Extract the value corresponding to the specified key in the JSON object below."
    max_new_tokens = ANSWER_LEN
    version = 2

    def make(self, rng: random.Random, num_items: int, index: int) -> Sample:
        pairs = [(random_uuid(rng), random_uuid(rng)) for _ in range(num_items)]
        body = ",\n".join(f'"{key}": "{value}"' for key, value in pairs)
        asked = [pairs[i] for i in spread(rng, num_items, NUM_QUESTIONS)]
        questions = (
            Question(f'Key: "{key}"\nThe value associated with this key is:', (value,)) for key, value in asked
        )
        return Sample(f"{{{body}}}", tuple(questions))


class RetrPrefixSuffix(GeneratedTask):
    """A list of random strings; the one that begins and ends as told is asked for."""

    name = "retr-prefix-suffix"
    source = "SCBench Retr.Prefix-Suffix, arXiv 2412.10319; lengths of strings are ours, the paper leaves them open"
    metric = "contains"
    num_questions = str(NUM_QUESTIONS)
    instruction = "Find the string in the list below that starts and ends as asked."
    max_new_tokens = ANSWER_LEN
    version = 2
    edge_len = 5

    def make(self, rng: random.Random, num_items: int, index: int) -> Sample:
        found: dict[tuple[str, str], str] = {}
        while len(found) < num_items:
            text = "".join(rng.choices(string.ascii_letters, k=rng.randint(20, 30)))
            found.setdefault((text[: self.edge_len], text[-self.edge_len :]), text)
        pairs = list(found.items())
        asked = [pairs[i] for i in spread(rng, num_items, NUM_QUESTIONS)]
        questions = (
            Question(f'Which string starts with "{start}" and ends with "{end}"?', (text,))
            for (start, end), text in asked
        )
        return Sample("\n".join(found.values()), tuple(questions))


def random_uuid(rng: random.Random) -> str:
    """A UUID that depends on `rng` alone."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))
