"""Questions made from a text alone: sentences of it with a word left out."""

from __future__ import annotations

import random
import re
from collections import Counter

from kvzip.errors import InputError
from kvzip.eval.tasks.base import Question, choose

SENTENCE = re.compile(r"[^.!?\n]+[.!?]")
WORD = re.compile(r"\b(?:[A-Z][a-z]+|\d[\d,.]*\d|\d)\b")
MIN_WORDS, MAX_WORDS = 8, 40
BLANK = "_____"


def cloze_questions(text: str, count: int, seed: int = 0) -> list[Question]:
    """`count` questions spread over the text, each asking for a name or a number that stands in it only once or twice.

    Raises InputError for a text with too few such sentences.
    """
    often = Counter(WORD.findall(text))
    found = []
    for sentence in (match[0].strip() for match in SENTENCE.finditer(text)):
        if not MIN_WORDS <= len(sentence.split()) <= MAX_WORDS:
            continue
        words = [match for match in WORD.finditer(sentence) if match.start() > 0 and often[match[0]] <= 2]
        if words:
            found.append((sentence, words))
    if len(found) < count:
        raise InputError(
            f"the text has {len(found)} sentences with a rare name or number, {count} are needed: "
            "give your own questions, or fewer"
        )
    rng = random.Random(seed)
    return [_question(*one, rng) for one in choose(found, count)]


def _question(sentence: str, words: list[re.Match[str]], rng: random.Random) -> Question:
    word = rng.choice(words)
    gap = f"{sentence[: word.start()]}{BLANK}{sentence[word.end() :]}"
    return Question(f'Which word of the text is missing in "{gap}"? Answer with that word alone.', (word[0],))
