"""Global against local replay: time, which pairs are kept, and what that does to answers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvzip.bench.baseline import plain_prefill
from kvzip.bench.measure import paired, ratios, report, timed
from kvzip.bench.texts import bench_questions, bench_text
from kvzip.eval.fidelity import fidelity, make_reference
from kvzip.llm import LLM
from kvzip.methods import Method, parse_method
from kvzip.ops.regression import rank_correlation
from kvzip.options import CompressOptions
from kvzip.prefilled import Prefilled
from kvzip.scorers import get_scorer
from kvzip.scorers.base import BaseScorer, Observation

NUM_QUESTIONS = 8
KEEP_RATIOS = (0.3, 0.5)


def bench_replay(llm: LLM, context_len: int, num_runs: int, text_path: str, baseline: bool = True) -> dict[str, Any]:
    """Both scopes on the same prefill, in alternation.

    text_path: SQuAD JSON, whose questions measure the effect on answers: mean KL(full || compressed) in nats over the
    full cache's greedy answers.  baseline: measure a plain prefill by transformers too, and the scorer apart from the
    forward pass of the local replay.  Figures: seconds and their ratios; rank correlation of the scores (Spearman);
    overlap of the kept sets, and KL, at two keep ratios.
    """
    text = bench_text(llm, context_len, text_path)
    full, method = llm.prefill(text), parse_method("kvzip")
    scores, figures = _score_both(full, method, num_runs)
    figures["rank_correlation"] = [rank_correlation(scores["global"], scores["local"])]
    if baseline:
        figures |= _baseline(full, scores["local"].shape, figures, num_runs)
    whole = full.compress(CompressOptions(keep_ratio=1.0, certify=False))
    references = [
        make_reference(whole, llm.question_ids(question))
        for question in bench_questions(text_path, text, NUM_QUESTIONS)
    ]
    for keep_ratio in KEEP_RATIOS:
        options = {s: CompressOptions(keep_ratio=keep_ratio, replay_scope=s, certify=False) for s in scores}
        kept = {scope: full.compress(asked) for scope, asked in options.items()}
        masks = [context.data.keep_mask for context in kept.values()]
        figures[f"overlap_{keep_ratio}"] = [float((masks[0] & masks[1]).sum() / masks[0].sum())]
        for scope, context in kept.items():
            figures[f"{scope}_kl_{keep_ratio}"] = [fidelity(context, reference).kl for reference in references]
    return report("replay", llm, full._full.context_ids.numel(), KEEP_RATIOS[0], text_path, figures)


def _score_both(full: Prefilled, method: Method, num_runs: int) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """The scores of each scope, remembered by `full`, and how long they took."""
    scores, known = {}, {}

    def score(scope: str) -> float:
        full._scores.clear()  # or the second run would find the first one's
        seconds, scores[scope] = timed(lambda: full.scores(method, replay_scope=scope), full.llm.model.device)
        known.update(full._scores)
        return seconds

    seconds = paired(num_runs, {"global_s": lambda: score("global"), "local_s": lambda: score("local")}, warmup=0)
    full._scores.update(known)
    return scores, seconds | {"local_over_global": ratios(seconds["local_s"], seconds["global_s"])}


def _baseline(
    full: Prefilled, shape: torch.Size, seconds: dict[str, list[float]], num_runs: int
) -> dict[str, list[float]]:
    """A plain prefill, and the local replay once more with a clock on its scorer.  shape: [Lf, Hkv, S]."""
    context, device = full._full, full.llm.model.device
    ids = torch.cat([context.prefix_ids, context.context_ids])
    scorer_s: list[float] = []

    def watch() -> float:
        scorer = TimedScorer(get_scorer("reconstruction", *shape), device)
        spent, _ = timed(lambda: context.replay(scorer, local=True), device)
        scorer_s.append(scorer.seconds)
        return spent - scorer.seconds

    works = {"prefill_s": lambda: timed(lambda: plain_prefill(full.llm, ids), device)[0], "local_forward_s": watch}
    found = paired(num_runs, works, warmup=0)
    return {
        **found,
        "scorer_s": scorer_s,
        "scorer_over_local_forward": ratios(scorer_s, found["local_forward_s"]),
        "global_over_prefill": ratios(seconds["global_s"], found["prefill_s"]),
        "local_over_prefill": ratios(seconds["local_s"], found["prefill_s"]),
    }


class TimedScorer(BaseScorer):
    """A scorer of replays, and the seconds that it took."""

    needs = frozenset({"replay_queries"})

    def __init__(self, scorer: BaseScorer, device: torch.device) -> None:
        super().__init__(scorer.shape)
        self.scorer, self.device, self.seconds = scorer, device, 0.0

    def observe(self, layer: int, observation: Observation) -> None:
        self.seconds += timed(lambda: self.scorer.observe(layer, observation), self.device)[0]

    def scores(self) -> Tensor:
        return self.scorer.scores()
