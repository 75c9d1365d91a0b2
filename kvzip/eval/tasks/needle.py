"""A needle in a haystack, at every depth (KVzip section 4.1, after Kamradt 2023)."""

from __future__ import annotations

import random
from collections.abc import Iterator

from kvzip.errors import InputError
from kvzip.eval.tasks.base import Question, Sample, Task, TaskSettings
from kvzip.files import read_utf8

CITIES = (
    "Chicago", "Nairobi", "Lisbon", "Osaka", "Quito", "Tallinn", "Perth", "Cairo", "Bogota", "Riga", "Hanoi",
)  # fmt: skip
NUM_DEPTHS = 11
LENGTH_PARTS = (1, 2, 4)  # of the length asked for
FILLER = (
    "The harbour was quiet that morning.", "A cart of hay went by on the upper road.", "Nobody had wound the clock.",
    "The bread was still warm.", "Rain was expected before noon.", "The dog slept by the door.",
    "Someone had left a ladder against the wall.", "The river carried leaves and a little foam.",
)  # fmt: skip


class Needle(Task):
    """One sentence with a number among others, at 11 depths from the beginning to the end, one depth a sample.

    Samples beyond the first 11 and 22 are half and a quarter as long.
    path: a text to hide it in; sentences of our own where none is given.
    """

    name = "niah"
    version = 2
    source = "needle in a haystack (G. Kamradt, 2023), as in arXiv 2505.23416"
    licence = "generated here"
    metric = "contains"
    num_questions = "1"
    reads = "a text as the haystack"
    max_new_tokens = 32  # a whole sentence with the number

    def samples(self, settings: TaskSettings) -> Iterator[Sample]:
        hays = {part: _hay(settings, settings.context_len // part) for part in LENGTH_PARTS}
        for index in range(settings.limit):
            rng = random.Random(f"{self.name}/{self.version}/{settings.seed}/{index}")
            depth = index % NUM_DEPTHS / (NUM_DEPTHS - 1)
            part = LENGTH_PARTS[index // NUM_DEPTHS % len(LENGTH_PARTS)]
            hay, city, number = hays[part], rng.choice(CITIES), str(rng.randint(1_000_000, 9_999_999))
            at = round(depth * len(hay))
            needle = f"One of the special magic numbers for {city} is: {number}."
            context = " ".join([*hay[:at], needle, *hay[at:]])
            question = Question(f"What is the special magic number for {city} mentioned in the text?", (number,))
            yield Sample(context, (question,), {"depth": depth, "context_len": settings.context_len // part})


def _hay(settings: TaskSettings, context_len: int) -> list[str]:
    """Sentences of about `context_len` tokens."""
    if settings.path is None:
        rng = random.Random(settings.seed)
        sentences = [rng.choice(FILLER) for _ in range(settings.context_len)]
    else:
        sentences = [s.strip() + "." for s in read_utf8(settings.path).replace("\n", " ").split(". ") if s.strip()]
    low, high = 0, len(sentences)
    while low < high:
        middle = (low + high + 1) // 2
        fits = settings.count_tokens(" ".join(sentences[:middle])) <= context_len
        low, high = (middle, high) if fits else (low, middle - 1)
    if low == len(sentences):
        raise InputError(f"{settings.path} is shorter than {settings.context_len} tokens: give a longer text")
    return sentences[:low]
