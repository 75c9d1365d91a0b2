"""The twelve published tasks of SCBench (arXiv 2412.10319): many questions about one long context each."""

from __future__ import annotations

import re
import string
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from kvzip.errors import InputError
from kvzip.eval.tasks import hub
from kvzip.eval.tasks.base import CountTokens, Question, Sample, Task, TaskSettings, judge

REPO, SPLIT = "microsoft/SCBench", "test"
OPTION_LINE = re.compile(r"^\s*\(([A-Z])\)\s*(.*\S)", re.MULTILINE)
ASKED_STATISTIC = re.compile(r"The (.+) is")


@dataclass(frozen=True)
class Part:
    """Questions of one sort.  metric: as `judge` takes it."""

    metric: str
    max_new_tokens: int


@dataclass(frozen=True)
class Config:
    """A data set of the hub.  parts: by what its turns hold as their `task`; a single one where they hold none."""

    title: str
    num_questions: str
    instruction: str
    parts: dict[str, Part]


KV_PART, REPOQA_PART = Part("contains", 80), Part("same_function", 1024)
CONFIGS = {
    "scbench_kv": Config(
        "Retr.KV", "5",
        "Below is a JSON object. You will be given one of its keys: answer with the value of that key.",
        {"": Part("contains", 150)},
    ),
    "scbench_prefix_suffix": Config(
        "Retr.Prefix-Suffix", "5",
        "Below are many strings. You will be told how one of them starts and ends: answer with the whole string.",
        {"": Part("contains", 150)},
    ),
    "scbench_vt": Config(
        "Retr.MultiHop", "5",
        "Variables are assigned in the text below. You will be asked for all of them that hold a value: list them.",
        {"": Part("fraction_found", 30)},
    ),
    "scbench_repoqa": Config(
        "Code.RepoQA", "5",
        "Below is the code of a repository. You will be told what one of its functions does: repeat exactly that "
        "function in a fenced code block.",
        {"": REPOQA_PART},
    ),
    "scbench_qa_eng": Config(
        "En.QA", "about 5",
        "Read the book below. You will be asked about it: answer in as few words as you can.",
        {"": Part("found_anywhere", 40)},
    ),
    "scbench_qa_chn": Config(
        "Zh.QA", "about 5",
        "请先读完下面这本书。之后会有关于它的提问，请用尽量少的字作答。",
        {"": Part("char_f1", 40)},
    ),
    "scbench_choice_eng": Config(
        "En.MultiChoice", "about 4",
        "Read the book below. You will be asked about it: answer with the letter of the right option.",
        {"": Part("option", 40)},
    ),
    "scbench_mf": Config(
        "Math.Find", "about 6",
        "Below is a list of numbers. You will be asked for one statistic of it: answer with the number alone.",
        {"": Part("first_number", 5)},
    ),
    "scbench_many_shot": Config(
        "ICL.ManyShot", "5",
        "Below are problems with solutions. You will be given one more: answer with the letter of the right option.",
        {"": Part("option", 10)},
    ),
    "scbench_summary": Config(
        "En.Sum", "5",
        "Below are several documents. You will be asked to summarize one of them.",
        {"": Part("rouge_lsum", 200)},
    ),
    "scbench_summary_with_needles": Config(
        "Mix.Sum+NIAH", "8",
        "Below are several documents with pass keys hidden between them. You will be asked for the summary of a "
        "document, or for a pass key: answer with the key alone then.",
        {"summary": Part("rouge_lsum", 800), "passkey": Part("first_number", 15)},
    ),
    "scbench_repoqa_and_kv": Config(
        "Mix.RepoQA+KV", "8",
        "Below is the code of a repository with pairs of a key and a value between its lines. You will be told what "
        "one of its functions does: repeat exactly that function in a fenced code block; or be given a key: answer "
        "with its value.",
        {"repoqa": REPOQA_PART, "kv": KV_PART},
    ),
}  # fmt: skip


class SCBench(Task):
    """One of the published data sets, its questions asked alone or in turn.

    path: a local copy in the form of the hub: rows with `context` and `multi_turns`, a list of {input, answer} with
    `options` in En.MultiChoice and `task` in the mixed sets, RepoQA with the `repo` of the row; a struct of lists is
    read too, and an answer may be a text, a number or a list.  Assumed, as the data could not be looked at:
    Retr.MultiHop has its text in `input` where it has no `context` (so the published loader), and ICL.ManyShot's answer
    is a letter, whose option stands in the question as a line "(A) ..." (so KVzip's scorer).

    A context longer than asked for loses its middle, as in the published loader, and with it what some questions are
    about: `about` says so.  Not as published: answers that are plain strings are scored whole, not by their characters
    (ICL.ManyShot, Zh.QA); the first letter of a word is no option; a variable is found as a whole word, and the share
    found is not rounded; Math.Find puts no question before the context, where a compressor would see it, and none of
    another turn before a question; RepoQA compares with the functions asked for in all rows of the repository, however
    many samples are run.  The parts of the mixed sets are judged apart.
    """

    licence = "MIT"
    reads = f"{hub.LOCAL_COPY}; the hub otherwise"

    def __init__(self, config: str) -> None:
        known = CONFIGS[config]
        self.config, self.parts = config, known.parts
        self.name = config.replace("_", "-")
        self.source = f"SCBench {known.title}, arXiv 2412.10319; {REPO} on the hub"
        self.metric = ", ".join(part.metric for part in known.parts.values())
        self.instruction = known.instruction
        self.max_new_tokens = max(part.max_new_tokens for part in known.parts.values())
        self.num_questions = known.num_questions

    def samples(self, settings: TaskSettings) -> Iterator[Sample]:
        rows = hub.rows(REPO, self.config, SPLIT, settings.path, self.name)
        functions = self._functions(rows) if REPOQA_PART in self.parts.values() else {}
        for number, row in islice(enumerate(rows, 1), settings.limit):
            try:
                sample = self._sample(row, functions, settings)
            except ValueError as error:
                raise self._malformed(number, error) from error
            yield sample

    def score(self, prediction: str, question: Question) -> float:
        return judge(self.parts[question.part].metric, prediction, question.golds)

    def _sample(self, row: dict[str, Any], functions: dict[str, list[str]], settings: TaskSettings) -> Sample:
        context = _context(row)
        shown = cut_middle(context, settings.context_len, settings.count_tokens)
        questions = tuple(self._question(turn, index, functions.get(_repo(row), [])) for index, turn in _turns(row))
        about = {"truncated": len(shown) < len(context), "id": row.get("id")}
        return Sample(shown, questions, about)

    def _question(self, turn: dict[str, Any], index: int, functions: Sequence[str]) -> Question:
        name = self._part(turn, index)
        part = self.parts[name]
        asked = turn.get("input")
        if not isinstance(asked, str) or not asked.strip():
            raise ValueError(f"turn {index} has no text as its input")
        answers = _answers(turn, index)
        if part.metric == "same_function":
            answers = (answers[0], *(f for f in functions if f != answers[0]))
        elif part.metric == "fraction_found":
            answers = tuple(word for answer in answers for word in re.findall(r"\w+", answer))
        elif part.metric == "option":
            options = _options(turn, index)
            answers = _option_golds(answers, options, index)
            if turn.get("options"):
                asked = "\n".join([asked, *(f"{letter}. {text}" for letter, text in options.items())])
        elif self.config == "scbench_mf" and (statistic := ASKED_STATISTIC.search(asked)):
            asked = f"What is the {statistic[1].lower()}?\n\n{asked}"
        return Question(asked, answers, name, part.max_new_tokens if name else None)

    def _part(self, turn: dict[str, Any], index: int) -> str:
        if "" in self.parts:
            return ""
        name = str(turn.get("task")).removeprefix("scbench_")
        if name not in self.parts:
            raise ValueError(f"turn {index} has task {turn.get('task')!r}: known: {', '.join(self.parts)}")
        return name

    def _functions(self, rows: hub.Rows) -> dict[str, list[str]]:
        """All functions that are asked for, by repository."""
        found: dict[str, dict[str, None]] = defaultdict(dict)
        for number, row in enumerate(rows, 1):
            try:
                for index, turn in _turns(row):
                    if self.parts[self._part(turn, index)] is REPOQA_PART:
                        found[_repo(row)][_answers(turn, index)[0]] = None
            except ValueError as error:
                raise self._malformed(number, error) from error
        return {repo: list(functions) for repo, functions in found.items()}

    def _malformed(self, number: int, error: ValueError) -> InputError:
        return InputError(f"not {self.config} of {REPO} (row {number}: {error}): give a copy of it as published")


KV = partial(SCBench, "scbench_kv")
PREFIX_SUFFIX = partial(SCBench, "scbench_prefix_suffix")
VT = partial(SCBench, "scbench_vt")
REPOQA = partial(SCBench, "scbench_repoqa")
QA_ENG = partial(SCBench, "scbench_qa_eng")
QA_CHN = partial(SCBench, "scbench_qa_chn")
CHOICE_ENG = partial(SCBench, "scbench_choice_eng")
MF = partial(SCBench, "scbench_mf")
MANY_SHOT = partial(SCBench, "scbench_many_shot")
SUMMARY = partial(SCBench, "scbench_summary")
SUMMARY_WITH_NEEDLES = partial(SCBench, "scbench_summary_with_needles")
REPOQA_AND_KV = partial(SCBench, "scbench_repoqa_and_kv")


def cut_middle(text: str, num_tokens: int, count_tokens: CountTokens) -> str:
    """The text itself, or as much of its two ends, the same of each, as `num_tokens` hold, to 1 part in 1000."""
    if count_tokens(text) <= num_tokens:
        return text
    low, high = 0, len(text) - 1
    while high - low > low // 1000:
        middle = (low + high + 1) // 2
        fits = count_tokens(_ends(text, middle)) <= num_tokens
        low, high = (middle, high) if fits else (low, middle - 1)
    return _ends(text, low)


def _ends(text: str, length: int) -> str:
    return text[: length // 2] + text[len(text) - (length - length // 2) :]


def _repo(row: dict[str, Any]) -> str:
    return str(row.get("repo"))


def _context(row: dict[str, Any]) -> str:
    found = row.get("context") or row.get("input")
    if isinstance(found, list) and found:  # the numbers of Math.Find
        return str(found)
    if not isinstance(found, str) or not found.strip():
        raise ValueError("it has no context")
    return found


def _turns(row: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The turns of a row, counted from 1."""
    found = row.get("multi_turns")
    if isinstance(found, dict):  # a struct of lists
        columns = {key: values for key, values in found.items() if values is not None}
        if not all(isinstance(values, list) for values in columns.values()):
            raise ValueError("its multi_turns are not lists")
        if len({len(values) for values in columns.values()}) > 1:
            raise ValueError("the lists of its multi_turns differ in length")
        found = [dict(zip(columns, turn, strict=True)) for turn in zip(*columns.values(), strict=True)]
    if not isinstance(found, list) or not found or not all(isinstance(turn, dict) for turn in found):
        raise ValueError("its multi_turns are not a list of turns")
    return enumerate(found, 1)


def _answers(turn: dict[str, Any], index: int) -> tuple[str, ...]:
    """The answer as texts: one, or all of a list."""
    answer = turn.get("answer")
    found = answer if isinstance(answer, list) else [answer]
    if not found or not all(isinstance(a, (str, int, float)) and str(a).strip() for a in found):
        raise ValueError(f"turn {index} has no answer")
    return tuple(str(a) for a in found)


def _options(turn: dict[str, Any], index: int) -> dict[str, str]:
    """Texts by letters: those of the turn, or the lines "(A) ..." of its question."""
    given = turn.get("options")
    if given is None or given == []:
        return {found[1]: found[2] for found in OPTION_LINE.finditer(turn["input"])}
    if not isinstance(given, list) or not 2 <= len(given) <= 26 or not all(isinstance(text, str) for text in given):
        raise ValueError(f"the options of turn {index} are not a list of texts")
    return dict(zip(string.ascii_uppercase, given, strict=False))


def _option_golds(answers: Sequence[str], options: dict[str, str], index: int) -> tuple[str, ...]:
    """Golds as `metrics.option` takes them."""
    for answer in answers:
        letter = next((letter for letter, text in options.items() if text.strip() == answer.strip()), None)
        stated = re.match(r"\s*\(([A-Z])\)|\s*([A-Z])\s*$", answer)
        letter = letter or (stated and (stated[1] or stated[2]))
        if letter and (letter in options or not options):
            others = (text for other, text in options.items() if other != letter)
            return (letter, *(options[letter], *others)) if options else (letter,)
    raise ValueError(f"the answer of turn {index}, {answers[0]!r:.60}, is none of its options")
