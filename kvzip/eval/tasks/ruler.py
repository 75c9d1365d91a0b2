"""Retrieval, tracking and counting after RULER (arXiv 2404.06654)."""

from __future__ import annotations

import random

from kvzip.eval.tasks.base import FittedTask, Question, Sample, spread
from kvzip.eval.tasks.needle import FILLER
from kvzip.eval.tasks.tracking import RetrMultiHop
from kvzip.eval.tasks.words import ADJECTIVES, CATEGORIES, coined_words

SOURCE = "RULER, arXiv 2404.06654"
NUM_KEYS = 4
NUM_FREQUENT = 3
NUM_COMMON = 10
NOISE_WORD = "..."


class MultiKey(FittedTask):
    """Needles with many keys in a haystack; the numbers of four keys are asked for, the others distract."""

    name = "ruler-multikey"
    source = f"{SOURCE}: niah_multikey"
    metric = "contains"
    num_questions = str(NUM_KEYS)
    max_new_tokens = 32  # a whole sentence with the number

    def make(self, rng: random.Random, num_items: int, index: int) -> Sample:
        things = [f"{a} {word}" for words in CATEGORIES.values() for word in words.split() for a in ADJECTIVES]
        keys = rng.sample(things, min(len(things), max(NUM_KEYS, num_items // 4)))
        numbers = [str(n) for n in rng.sample(range(1_000_000, 10_000_000), len(keys))]
        lines = [rng.choice(FILLER) for _ in range(num_items)]
        for place, key, number in zip(spread(rng, num_items, len(keys)), keys, numbers, strict=True):
            lines[place] = f"One of the special magic numbers for {key} is: {number}."
        questions = (
            Question(f"What is the special magic number for {keys[i]} mentioned in the text?", (numbers[i],))
            for i in spread(rng, len(keys), NUM_KEYS)
        )
        return Sample(" ".join(lines), tuple(questions))


class VariableTracking(RetrMultiHop):
    """One chain of four hops, as RULER has it by default."""

    name = "ruler-vt"
    source = f"{SOURCE}: vt"
    num_questions = "1"
    num_chains, num_hops = 1, 4
    max_new_tokens = 64


class FrequentWords(FittedTask):
    """Coined words whose counts fall as the square of their rank (zeta distribution); the three commonest are asked.

    The most frequent of all is noise, as in RULER, and does not count. Counts of the first five ranks all differ.
    """

    name = "ruler-fwe"
    source = f"{SOURCE}: fwe, alpha 2.0"
    metric = "fraction_found"
    num_questions = "1"
    instruction = f"Below is a coded text. Track how often each coded word appears, and ignore '{NOISE_WORD}'."
    max_new_tokens = 48
    min_items = 120

    def make(self, rng: random.Random, num_items: int, index: int) -> Sample:
        names = [NOISE_WORD, *coined_words(rng, num_items)]
        words: list[str] = []
        for rank, word in enumerate(names, 1):
            words += [word] * max(1, round(num_items / 1.645 / rank**2))
            if len(words) >= num_items:
                break
        rng.shuffle(words)
        question = Question(
            "What are the three coded words that appear most often in the text above?",
            tuple(names[1 : NUM_FREQUENT + 1]),
        )
        return Sample(" ".join(words), (question,))


class CommonWords(FittedTask):
    """A numbered list in which ten words come ten times as often as all the others; the ten are asked for."""

    name = "ruler-cwe"
    source = f"{SOURCE}: cwe; counts scale with the length, the ratio of ten is RULER's"
    metric = "fraction_found"
    num_questions = "1"
    instruction = "Below is a numbered list of words, in which ten words come more often than all others."
    max_new_tokens = 96
    min_items = 110

    def make(self, rng: random.Random, num_items: int, index: int) -> Sample:
        rare_count = max(1, num_items // 400)
        names = coined_words(rng, num_items)
        common = names[:NUM_COMMON]
        words = common * (10 * rare_count)
        rare = (word for word in names[NUM_COMMON:] for _ in range(rare_count))
        words += [next(rare) for _ in range(num_items - len(words))]
        rng.shuffle(words)
        listed = " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))
        return Sample(listed, (Question("What are the ten most common words in the list above?", tuple(common)),))
