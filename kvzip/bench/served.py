"""What answers lose on vLLM: contexts with counts of their own in each head, portable ones, and the text itself."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvzip import store
from kvzip.bench.certificate import samples_of
from kvzip.bench.measure import report
from kvzip.eval.metrics import found_anywhere
from kvzip.eval.tasks.base import Question, Sample, choose
from kvzip.export import make_portable
from kvzip.integrations.vllm.offline import engine, generate, sampling, transfer_config
from kvzip.llm import LLM
from kvzip.options import CompressOptions
from kvzip.store import portable

RAGGED, PORTABLE = (0.5, 0.3), (0.7, 0.5)
NUM_QUESTIONS, NUM_NEW = 5, 16
TOP, SEEN = 50, 1000  # likeliest tokens that are compared, and among how many of the other's they are looked for
OPTIONS: dict[str, Any] = {
    "enforce_eager": True, "block_size": 32, "max_num_seqs": 16, "max_logprobs": SEEN, "kv_cache_memory_bytes": 2 << 30,
}  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """One question of one text.  ids: of the question behind the context.  prefix: of prefix and text."""

    text: int
    question: Question
    ids: list[int]
    prefix: list[int]


def bench_served(llm: LLM, context_len: int, num_texts: int, text_path: str) -> dict[str, Any]:
    """Texts of a SQuAD JSON file and their questions, each kept in several ways and asked through vLLM.

    Figures, for each way: `<way>_kl`, mean KL(full || way) a token of the answer that the plain prompt gets, in nats,
    over its 50 likeliest tokens and all others as one; `<way>_right`, 1 where the way's own answer holds a gold one;
    `<way>_same`, 1 where it is the plain prompt's.  Raises InputError for a file with too few texts.
    """
    with tempfile.TemporaryDirectory() as folder:
        samples = enumerate(samples_of(llm, context_len, num_texts, text_path))
        asked = [one for number, sample in samples for one in _store(llm, Path(folder), number, sample)]
        longest = max(len(one.prefix) + len(one.ids) for one in asked) + 2 * NUM_NEW
        transfer = transfer_config(Path(folder))
        options = {**OPTIONS, "max_model_len": longest, "dtype": llm.dtype_name}
        with engine(llm.model.config.name_or_path, kv_transfer_config=transfer, **options) as served:
            figures = _measure(served, asked)
    return report("served", llm, context_len, RAGGED[0], text_path, figures, texts=num_texts)


def _store(llm: LLM, folder: Path, number: int, sample: Sample) -> list[Asked]:
    """Keep the text in all ways, and its questions."""
    prefilled = llm.prefill(sample.context)
    for ratio in RAGGED:
        context = prefilled.compress(CompressOptions(keep_ratio=ratio, certify=False))
        store.write(folder / f"{number}-ragged-{ratio}.kvz", context.data)
    for ratio in PORTABLE:
        even = make_portable(llm, context.data, ratio, certify=False)
        portable.write(folder / f"{number}-portable-{ratio}.kvp", even)
    prefix = [*llm.prefix_ids(), *context.data.context_ids.tolist()]
    questions = choose(sample.questions, min(NUM_QUESTIONS, len(sample.questions)))
    return [Asked(number, question, llm.question_ids(question.text), prefix) for question in questions]


def _measure(served: Any, asked: Sequence[Asked]) -> dict[str, list[float]]:
    plain = [sampling(None, NUM_NEW, logprobs=TOP)] * len(asked)
    full = generate(served, [[*one.prefix, *one.ids] for one in asked], plain)
    figures = {"full_right": [_is_right(found.text, one) for found, one in zip(full, asked, strict=True)]}
    ways = [*(f"ragged-{ratio}" for ratio in RAGGED), *(f"portable-{ratio}" for ratio in PORTABLE)]
    for way in ways:
        names = [f"{one.text}-{way}" for one in asked]
        own = generate(served, [one.ids for one in asked], [sampling(name, NUM_NEW) for name in names])
        figures[f"{way}_right"] = [_is_right(found.text, one) for found, one in zip(own, asked, strict=True)]
        figures[f"{way}_same"] = [float(a.token_ids == b.token_ids) for a, b in zip(own, full, strict=True)]
        figures[f"{way}_kl"] = [
            _answer_kl(served, name, one, found) for name, one, found in zip(names, asked, full, strict=True)
        ]
    return figures


def _is_right(answer: str, asked: Asked) -> float:
    return found_anywhere(answer, asked.question.golds)


def _answer_kl(served: Any, name: str, asked: Asked, full: Any) -> float:
    """Mean KL a token of the plain prompt's answer, each behind its own tokens before."""
    answer = list(full.token_ids)
    prompts = [[*asked.ids, *answer[:step]] for step in range(len(answer))]
    params = sampling(name, 1, logprobs=SEEN, detokenize=False)
    found = generate(served, prompts, [params] * len(prompts))
    pairs = zip(full.logprobs, found, strict=True)
    parts = [truncated_kl(_log_probs(own), _log_probs(one.logprobs[0])) for own, one in pairs]
    return sum(parts) / len(parts)


def _log_probs(step: Mapping[int, Any]) -> dict[int, float]:
    return {token: entry.logprob for token, entry in step.items()}


def truncated_kl(full: Mapping[int, float], other: Mapping[int, float]) -> float:
    """KL(full || other) in nats over the tokens of `full`, log-probabilities by token, and all others as one.

    A token that `other` lacks is taken to be as likely as its least likely one. Never more than the whole divergence
    but for that.
    """
    least = min(other.values())
    total, rest_full, rest_other = 0.0, 1.0, 1.0
    for token, log_prob in full.items():
        theirs = other.get(token, least)
        share = math.exp(log_prob)
        total += share * (log_prob - theirs)
        rest_full, rest_other = rest_full - share, rest_other - math.exp(theirs)
    if rest_full > 1e-6 and rest_other > 1e-6:
        total += rest_full * math.log(rest_full / rest_other)
    return max(0.0, total)
