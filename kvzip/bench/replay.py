"""Global against local replay: time, which pairs are kept, and what that does to answers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvzip.bench.measure import paired, ratios, report, timed
from kvzip.bench.texts import bench_questions, bench_text
from kvzip.hf.cache import SessionCache
from kvzip.llm import LLM, CompressedContext
from kvzip.methods import parse_method
from kvzip.options import CompressOptions

NUM_QUESTIONS, NUM_TOKENS = 8, 16
KEEP_RATIOS = (0.3, 0.5)


def bench_replay(llm: LLM, context_len: int, num_runs: int, text_path: str) -> dict[str, Any]:
    """Both scopes on the same prefill, in alternation.

    text_path: SQuAD JSON, whose questions measure the effect on answers: mean KL(full || compressed) in nats over the
    full cache's greedy answers.  Figures: seconds of each replay and their ratio; rank correlation of the scores
    (Spearman); overlap of the kept sets and KL at keep ratio 0.3 and 0.5.
    """
    text = bench_text(llm, context_len, text_path)
    full, method = llm.prefill(text), parse_method("kvzip")
    scores: dict[str, Tensor] = {}
    known = {}

    def score(scope: str) -> float:
        full._scores.clear()  # or the second run would find the first one's
        seconds, scores[scope] = timed(lambda: full.scores(method, replay_scope=scope), llm.model.device)
        known.update(full._scores)
        return seconds

    seconds = paired(num_runs, {"global_s": lambda: score("global"), "local_s": lambda: score("local")}, warmup=0)
    full._scores.update(known)
    figures = {
        **seconds,
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
