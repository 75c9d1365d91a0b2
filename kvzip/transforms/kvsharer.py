"""Layers that use the keys and values of a lower layer (KVSharer, arXiv 2410.18517)."""

from __future__ import annotations

from kvzip.context import RaggedLayer
from kvzip.transforms.base import BaseTransform, Evicted


class KVSharer(BaseTransform):
    """Some layers store nothing and use the keys and values of a lower one, as a profile of the model says.

    They do so from the first token read on, so a text is read anew for this method. Pairs of the other layers stay as
    they are. Memory and what attention reads become less; the projections of shared layers are still computed.
    """

    summary = "some layers use the keys and values of a lower one, by a profile of the model"
    source = "KVSharer, arXiv 2410.18517"
    shares_layers = True

    def apply(self, layer: RaggedLayer, evicted: Evicted) -> RaggedLayer:
        return layer
