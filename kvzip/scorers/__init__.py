"""Scorers by name. An entry is a lazy string, so that nothing is imported before it is used."""

from __future__ import annotations

from importlib import import_module

from kvzip.errors import UnknownNameError
from kvzip.scorers.base import Scorer

SCORERS = {
    "key-norm": "kvzip.scorers.key_norm:KeyNormScorer",
    "random": "kvzip.scorers.baseline:RandomScorer",
    "reconstruction": "kvzip.scorers.reconstruction:ReconstructionScorer",
    "reconstruction-faithful": "kvzip.scorers.reconstruction:FaithfulReconstructionScorer",
    "sinks-recent": "kvzip.scorers.baseline:SinksRecentScorer",
}


def get_scorer(name: str, num_layers: int, num_kv_heads: int, context_len: int) -> Scorer:
    """A new scorer of that name for a context of that shape. Raises UnknownNameError."""
    if name not in SCORERS:
        raise UnknownNameError.of("scorer", name, SCORERS)
    module, cls = SCORERS[name].split(":")
    scorer: Scorer = getattr(import_module(module), cls)(num_layers, num_kv_heads, context_len)
    return scorer
