"""Foretold scores (`kvzip-fast`) against those of a replay: time, which pairs are kept, and the effect on answers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvzip.bench.measure import paired, ratios, report, timed
from kvzip.bench.texts import bench_questions, bench_text
from kvzip.distill import KEEP_RATIOS, agreement
from kvzip.eval.fidelity import fidelity, make_reference
from kvzip.llm import LLM
from kvzip.methods import parse_method
from kvzip.options import CompressOptions
from kvzip.prefilled import Prefilled
from kvzip.progress import silent
from kvzip.surrogates import surrogate_source

NUM_QUESTIONS, MOST_QUESTIONS = 16, 48  # where there are more than sixteen: of so few, one could double the mean
METHODS = {"fast": "kvzip-fast", "kvzip": "kvzip"}


def bench_distill(llm: LLM, context_len: int, num_runs: int, text_path: str) -> dict[str, Any]:
    """Both methods on the same text, which the weights must not have been fitted to.

    text_path: SQuAD JSON, whose questions measure the effect on answers: mean KL(full || compressed) in nats over the
    full cache's greedy answers.  Figures: seconds of a prefill without a scorer, and of one with it;
    `fast_over_prefill`: what the scorer takes by its own clock, over the rest of the same prefill;
    `extra_over_prefill`: by how much that prefill is longer than the one without; `kvzip_over_prefill`: a replay;
    rank correlation of the scores (Spearman); overlap of the kept sets, and KL of both, at two keep ratios.
    Raises ModelError for a model without weights.
    """
    llm.profile_for(parse_method("kvzip-fast").needs)  # refuse before any work
    text = bench_text(llm, context_len, text_path)
    full, scores, figures = _score_both(llm, text, num_runs)
    found = agreement(scores["kvzip"], scores["fast"])
    figures["rank_correlation"] = [found.rank_correlation]
    figures |= {f"overlap_{ratio}": [share] for ratio, share in found.overlap.items()}
    whole = full.compress(CompressOptions(keep_ratio=1.0, certify=False))
    questions = bench_questions(text_path, text, NUM_QUESTIONS, MOST_QUESTIONS)
    references = [make_reference(whole, llm.question_ids(question)) for question in questions]
    for ratio in KEEP_RATIOS:
        for name, method in METHODS.items():
            context = full.compress(CompressOptions(keep_ratio=ratio, method=method, certify=False))
            figures[f"{name}_kl_{ratio}"] = [fidelity(context, reference).kl for reference in references]
    learned_from = surrogate_source(llm.fingerprint)
    num_tokens = full._full.context_ids.numel()
    return report("distill", llm, num_tokens, KEEP_RATIOS[0], text_path, figures, learned_from=learned_from)


def _score_both(llm: LLM, text: str, num_runs: int) -> tuple[Prefilled, dict[str, Tensor], dict[str, list[float]]]:
    """The text read with the fast scorer watching, the scores of both methods, and how long each took."""
    prefix_ids, context_ids = torch.tensor(llm.prefix_ids(), dtype=torch.int64), llm.tokenize(text)
    device = llm.model.device
    methods = {name: parse_method(method) for name, method in METHODS.items()}
    last: list[Prefilled] = []
    scores: dict[str, Tensor] = {}
    scorer_s: list[float] = []
    rest_s: list[float] = []

    def read(is_watched: bool) -> float:
        last.clear()
        scorer = methods["fast"].scorer if is_watched else None
        texts = None, None, None
        seconds, full = timed(lambda: Prefilled(llm, prefix_ids, context_ids, texts, silent, scorer), device)
        last.append(full)
        return seconds

    def score(name: str) -> float:
        seconds, scores[name] = timed(lambda: last[0].scores(methods[name]), device)
        return seconds

    def fast() -> float:
        seconds = read(True)
        scorer_s.append(last[0]._full.watched_s("distilled"))
        rest_s.append(last[0]._full.prefill_s)
        return seconds + score("fast")

    works = {"prefill_s": lambda: read(False), "fast_s": fast, "replay_s": lambda: score("kvzip")}
    seconds = paired(num_runs, works, warmup=0)
    more = {
        "fast_over_prefill": ratios(scorer_s, rest_s),
        "extra_over_prefill": [f / p - 1 for f, p in zip(seconds["fast_s"], seconds["prefill_s"], strict=True)],
        "kvzip_over_prefill": ratios(seconds["replay_s"], seconds["prefill_s"]),
    }
    return last[0], scores, seconds | more
