"""Whole heads by a profile of the model (KVzip's context-independent eviction, arXiv 2505.23416)."""

from __future__ import annotations

from kvzip.scorers.base import BaseScorer, Profile


class HeadProfileScorer(BaseScorer):
    """A pair's score is that of its head in the profile."""

    needs = frozenset({"head_profile"})
    summary = "one score a head, by a profile of the model"
    source = "KVzip, arXiv 2505.23416"

    def learn(self, profile: Profile) -> None:
        self._scores = profile["head_scores"].unsqueeze(-1).expand(self.shape)
