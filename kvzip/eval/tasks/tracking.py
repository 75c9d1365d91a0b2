"""Variables that are assigned to each other (SCBench Retr.MultiHop after RULER, arXiv 2404.06654)."""

from __future__ import annotations

import random
import string

from kvzip.eval.tasks.base import GeneratedTask, Question, Sample

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


class RetrMultiHop(GeneratedTask):
    """Chains of assignments among noise; all variables that hold a value are asked for."""

    name = "retr-multihop"
    source = "SCBench Retr.MultiHop, arXiv 2412.10319; five chains of two hops, so that there are five questions"
    metric = "fraction_found"
    num_questions = "5"
    instruction = "Memorize and track the chains of variable assignments hidden in the following text."
    max_new_tokens = 48
    num_chains, num_hops = 5, 2
    min_items = 15

    def make(self, rng: random.Random, num_items: int, index: int) -> Sample:
        length = self.num_hops + 1
        names = _distinct(rng, string.ascii_uppercase, 5, self.num_chains * length)
        values = _distinct(rng, "123456789", 5, self.num_chains)
        chains = [names[i * length : (i + 1) * length] for i in range(self.num_chains)]
        lines = [NOISE] * num_items
        places = sorted(rng.sample(range(num_items), len(names)))
        order = [chain for chain in range(self.num_chains) for _ in range(length)]
        rng.shuffle(order)
        reached = [0] * self.num_chains
        for place, chain in zip(places, order, strict=True):
            hop = reached[chain]
            given = values[chain] if hop == 0 else f"VAR {chains[chain][hop - 1]}"
            lines[place] = f"{NOISE} VAR {chains[chain][hop]} = {given}"
            reached[chain] += 1
        questions = tuple(
            Question(
                f"Which variables are assigned the value {value} in the text above? List all of them.", tuple(chain)
            )
            for value, chain in zip(values, chains, strict=True)
        )
        return Sample("\n".join(lines), questions)


def _distinct(rng: random.Random, letters: str, length: int, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choices(letters, k=length))] = None
    return list(found)
