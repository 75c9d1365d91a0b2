"""Grade-school mathematics with the question split off (GSM8K, arXiv 2110.14168, as arXiv 2505.23416 uses it)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import islice

from kvzip.errors import InputError
from kvzip.eval.tasks.base import Question, Sample, Task, TaskSettings
from kvzip.eval.tasks.hub import rows
from kvzip.files import read_utf8

MIN_TOKENS = 72  # contexts shorter than that are left out, as in the paper
BETWEEN_SENTENCES = re.compile(r"(?<=[.!?])\s+")


class GSM8K(Task):
    """All sentences of a problem but the last are the context, the last one is the question.

    path: JSON lines with `question` and `answer`, the result after "####"; the hub where none is given.
    The paper's scorer takes a gold number that stands anywhere in the answer, so that 5 is found in 15; here the number
    after the last "answer is" must be equal.
    """

    name = "gsm8k"
    source = "GSM8K, arXiv 2110.14168; split as in arXiv 2505.23416"
    licence = "that of the file: GSM8K is MIT"
    metric = "stated_number"
    num_questions = "1"
    reads = "GSM8K as JSON lines; the test split from the hub otherwise"
    instruction = 'Solve the problem step by step and end with "The answer is N.", N the number alone.'
    max_new_tokens = 256

    def samples(self, settings: TaskSettings) -> Iterator[Sample]:
        path = settings.path
        problems = _problems(path) if path else rows("openai/gsm8k", "main", "test", None, self.name)
        found = (_sample(problem) for problem in problems)
        long = (s for s in found if s is not None and settings.count_tokens(s.context) >= MIN_TOKENS)
        return islice(long, settings.limit)


def _sample(problem: dict[str, str]) -> Sample | None:
    *context, asked = BETWEEN_SENTENCES.split(problem["question"].strip())
    if not context:
        return None
    gold = problem["answer"].rpartition("####")[2].strip()
    return Sample(" ".join(context), (Question(asked, (gold,)),))


def _problems(path: str) -> list[dict[str, str]]:
    try:
        found = [json.loads(line) for line in read_utf8(path).split("\n") if line.strip()]
        for problem in found:
            problem["question"].strip(), problem["answer"].rpartition("####")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not GSM8K as JSON lines ({error!r})") from error
    return found
