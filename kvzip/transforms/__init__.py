"""Transforms by name, in the order in which they are applied. An entry is a lazy string, as a scorer's."""

from __future__ import annotations

from kvzip.parts import Part, named
from kvzip.transforms.base import BaseTransform

TRANSFORMS = {
    "kvsharer": "kvzip.transforms.kvsharer:KVSharer",
    "refit": "kvzip.transforms.refit:Refit",
    "levels": "kvzip.transforms.levels:Levels",
    "quantize": "kvzip.transforms.quantize:Quantize",
}


def transform_class(name: str) -> type[BaseTransform]:
    """The class of that name. Raises UnknownNameError."""
    found: type[BaseTransform] = named("transform", name, TRANSFORMS)
    return found


def get_transform(part: Part) -> BaseTransform:
    """A new transform with the options of that part."""
    made: BaseTransform = part.call(transform_class(part.name))
    return made
