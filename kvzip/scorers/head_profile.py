"""Whole heads by a profile of the model (KVzip's context-independent eviction, arXiv 2505.23416)."""

from __future__ import annotations

from kvzip.scorers.base import BaseScorer


class HeadProfileScorer(BaseScorer):
    """A pair's score is that of its head; whoever knows the model loads the profile."""

    needs = frozenset({"head_profile"})
    summary = "one score a head, computed once per model by `kvzip profile-heads`"
    source = "KVzip, arXiv 2505.23416"
