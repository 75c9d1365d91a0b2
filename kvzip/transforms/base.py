"""What a transform is: the kept pairs of a layer, stored in another way."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from kvzip.context import RaggedLayer


class BaseTransform:
    """Changes what eviction left of each full-attention layer, one layer after another.

    summary, source: for `kvzip methods`.  shares_layers: whether layers are read and stored with the keys and values of
    another one, as a profile of the model says.  stores_codes: whether numbers become codes; only one transform of a
    method may do that.  needs_scores: whether `apply` is to be given the scores of the pairs.
    Options are the keyword-only parameters of `__init__` (see `kvzip.parts`).
    """

    summary: ClassVar[str] = ""
    source: ClassVar[str] = ""
    shares_layers: ClassVar[bool] = False
    stores_codes: ClassVar[bool] = False
    needs_scores: ClassVar[bool] = False

    def apply(self, layer: RaggedLayer, scores: Tensor | None = None) -> RaggedLayer:
        """The same pairs in another form. Raises InputError where these can't be stored so.

        scores: [N] float32 of the pairs, infinite for those of the prefix; None where nothing was scored.
        """
        raise NotImplementedError

    def pair_nbytes(self, head_dim: int, itemsize: int) -> float:
        """Bytes of one pair, on average.  itemsize: bytes of a number before."""
        return 2 * head_dim * itemsize

    def head_nbytes(self, head_dim: int) -> int:
        """Bytes that a head may take beside those of its pairs, at most."""
        return 0
