"""Global against local replay: time, which pairs are kept, and what that does to answers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvzip.bench.baseline import plain_prefill
from kvzip.bench.measure import paired, ratios, report, timed
from kvzip.bench.texts import bench_questions, bench_text
from kvzip.hf.cache import SessionCache
from kvzip.llm import LLM, CompressedContext
from kvzip.methods import parse_method
from kvzip.options import CompressOptions
from kvzip.scorers import get_scorer
from kvzip.scorers.base import Observation, Scorer

NUM_QUESTIONS, NUM_TOKENS = 8, 16
KEEP_RATIOS = (0.3, 0.5)


def bench_replay(llm: LLM, context_len: int, num_runs: int, text_path: str) -> dict[str, Any]:
    """Both scopes on the same prefill, and a plain prefill by transformers, in alternation.

    text_path: SQuAD JSON, whose questions measure the effect on answers: mean KL(full || compressed) in nats over the
    full cache's greedy answers.  Figures: seconds of each replay, and of the scorer apart from the forward pass of the
    local one; ratios; rank correlation of the scores (Spearman); overlap of the kept sets, and KL, at two keep ratios.
    """
    text = bench_text(llm, context_len, text_path)
    ids = torch.cat([torch.tensor(llm.prefix_ids(), dtype=torch.int64), llm.tokenize(text)])
    full, method = llm.prefill(text), parse_method("kvzip")
    scores: dict[str, Tensor] = {}
    known, scorer_s = {}, []

    def plain() -> float:
        return timed(lambda: plain_prefill(llm, ids), llm.model.device)[0]

    def score(scope: str) -> float:
        full._scores.clear()  # or the second run would find the first one's
        seconds, scores[scope] = timed(lambda: full.scores(method, replay_scope=scope), llm.model.device)
        known.update(full._scores)
        return seconds

    def watch() -> float:
        scorer = TimedScorer(get_scorer(method.scorer, *scores["local"].shape), llm.model.device)
        seconds, _ = timed(lambda: full._full.replay(scorer, local=True), llm.model.device)
        scorer_s.append(scorer.seconds)
        return seconds - scorer.seconds

    works = {"prefill_s": plain, "global_s": lambda: score("global"), "local_s": lambda: score("local")}
    seconds = paired(num_runs, works | {"local_forward_s": watch}, warmup=0)
    full._scores.update(known)
    figures = {
        **seconds,
        "scorer_s": scorer_s,
        "scorer_over_local_forward": ratios(scorer_s, seconds["local_forward_s"]),
        "global_over_prefill": ratios(seconds["global_s"], seconds["prefill_s"]),
        "local_over_prefill": ratios(seconds["local_s"], seconds["prefill_s"]),
        "local_over_global": ratios(seconds["local_s"], seconds["global_s"]),
        "rank_correlation": [rank_correlation(scores["global"], scores["local"])],
    }
    references = _references(full.compress(1.0), bench_questions(text_path, text, NUM_QUESTIONS))
    for keep_ratio in KEEP_RATIOS:
        kept = {s: full.compress(CompressOptions(keep_ratio=keep_ratio, replay_scope=s)) for s in ("global", "local")}
        masks = [context.data.keep_mask for context in kept.values()]
        figures[f"overlap_{keep_ratio}"] = [float((masks[0] & masks[1]).sum() / masks[0].sum())]
        for scope, context in kept.items():
            figures[f"{scope}_kl_{keep_ratio}"] = [_kl(context, *reference) for reference in references]
    return report("replay", llm, full._full.context_ids.numel(), KEEP_RATIOS[0], text_path, figures)


class TimedScorer:
    """A scorer, and the seconds that it took."""

    def __init__(self, scorer: Scorer, device: torch.device) -> None:
        self.scorer, self.device, self.needs, self.seconds = scorer, device, scorer.needs, 0.0

    def observe(self, layer: int, observation: Observation) -> None:
        self.seconds += timed(lambda: self.scorer.observe(layer, observation), self.device)[0]

    def scores(self) -> Tensor:
        return self.scorer.scores()


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's, over all entries."""
    ranks = torch.stack([t.flatten().argsort().argsort() for t in (first, second)]).double()
    return float(torch.corrcoef(ranks)[0, 1])


def _references(whole: CompressedContext, questions: list[str]) -> list[tuple[Tensor, Tensor]]:
    """For each question its ids with the full cache's answer, and the log-probabilities [n, V] of that answer."""
    found = []
    for question in questions:
        answer = whole.ask(question, max_new_tokens=NUM_TOKENS)
        ids = torch.tensor(whole.llm.question_ids(question) + answer.token_ids[:-1])
        found.append((ids, _log_probs(whole, ids, len(answer.token_ids))))
    return found


@torch.inference_mode()
def _log_probs(context: CompressedContext, ids: Tensor, last: int) -> Tensor:
    cache = SessionCache(context.data, context.llm.backend)
    logits = context.llm.model(
        ids.to(context.llm.model.device)[None], past_key_values=cache, logits_to_keep=last
    ).logits
    return torch.log_softmax(logits[0].float(), dim=-1)


def _kl(context: CompressedContext, ids: Tensor, expected: Tensor) -> float:
    found = _log_probs(context, ids, len(expected))
    return float((expected.exp() * (expected - found)).sum(-1).mean())
