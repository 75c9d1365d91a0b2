"""Scorers by name. An entry is a lazy string, so that nothing is imported before it is used."""

from __future__ import annotations

from kvzip.parts import make_part, named, split_part
from kvzip.scorers.base import BaseScorer

SCORERS = {
    "accumulated": "kvzip.scorers.accumulated:AccumulatedScorer",
    "distilled": "kvzip.scorers.distilled:DistilledScorer",
    "expected": "kvzip.scorers.expected:ExpectedScorer",
    "head-profile": "kvzip.scorers.head_profile:HeadProfileScorer",
    "key-norm": "kvzip.scorers.key_norm:KeyNormScorer",
    "last-query": "kvzip.scorers.last_query:LastQueryScorer",
    "mean-attention": "kvzip.scorers.mean_attention:MeanAttentionScorer",
    "random": "kvzip.scorers.chance:RandomScorer",
    "reconstruction": "kvzip.scorers.reconstruction:ReconstructionScorer",
    "reconstruction-plus": "kvzip.scorers.reconstruction_plus:ReconstructionPlusScorer",
    "sinks-recent": "kvzip.scorers.sinks_recent:SinksRecentScorer",
    "suffix-loss": "kvzip.scorers.suffix_loss:SuffixLossScorer",
    "window": "kvzip.scorers.window:WindowScorer",
}
FAITHFUL = {"reconstruction-faithful": "kvzip.scorers.reconstruction:FaithfulReconstructionScorer"}  # an option's


def scorer_class(name: str) -> type[BaseScorer]:
    """The class of that name. Raises UnknownNameError."""
    found: type[BaseScorer] = named("scorer", name, SCORERS | FAITHFUL)
    return found


def get_scorer(text: str, num_layers: int, num_kv_heads: int, context_len: int) -> BaseScorer:
    """A new scorer, named with its options as in `window:window_size=64`, for a context of that shape.

    Raises UnknownNameError, and InputError for options that can't be, alone or with a context that short.
    """
    name, given = split_part(text)
    cls = scorer_class(name)
    scorer: BaseScorer = make_part(name, cls, given).call(cls, (num_layers, num_kv_heads, context_len))
    return scorer
