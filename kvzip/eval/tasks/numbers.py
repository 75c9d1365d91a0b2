"""Statistics of a long list of numbers (SCBench Math.Find, arXiv 2412.10319)."""

from __future__ import annotations

import random

from kvzip.eval.tasks.base import GeneratedTask, Question, Sample


class MathFind(GeneratedTask):
    """A list of three-digit numbers; five statistics are asked for.

    The paper shows the maximum as its example and names no full list; the five are ours. The length of the list is odd,
    so that the median is one of its numbers.
    """

    name = "math-find"
    source = "SCBench Math.Find, arXiv 2412.10319"
    metric = "first_number"
    num_questions = "5"
    instruction = "Below is a list of numbers."
    max_new_tokens = 8

    def make(self, rng: random.Random, num_items: int, index: int) -> Sample:
        numbers = [rng.randint(100, 999) for _ in range(num_items | 1)]
        ordered, different = sorted(numbers), sorted(set(numbers))
        answers = {
            "largest number": ordered[-1],
            "smallest number": ordered[0],
            "median": ordered[len(ordered) // 2],
            "second largest number": different[-2],
            "second smallest number": different[1],
        }
        questions = (
            Question(f"What is the {name} in the list? Answer with the number alone.", (str(value),))
            for name, value in answers.items()
        )
        return Sample("[" + ", ".join(map(str, numbers)) + "]", tuple(questions))
