"""What a fetch is: the pairs of a layer stay in a file, and each step brings those that it needs into memory."""

from __future__ import annotations

from typing import ClassVar

from kvzip.context import RaggedLayer


class BaseFetch:
    """Prepares what eviction left of each full-attention layer, one layer after another.

    summary, source: for `kvzip methods`.  Options are the keyword-only parameters of `__init__` (see `kvzip.parts`).
    """

    summary: ClassVar[str] = ""
    source: ClassVar[str] = ""

    def apply(self, layer: RaggedLayer, index: int) -> RaggedLayer:
        """The same pairs with what finds them.  index: of the layer in the model, from 0."""
        raise NotImplementedError
