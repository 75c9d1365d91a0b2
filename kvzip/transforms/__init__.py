"""Transforms by name, in the order in which they are applied. An entry is a lazy string, as a scorer's."""

from __future__ import annotations

from importlib import import_module

from kvzip.errors import UnknownNameError
from kvzip.parts import Part
from kvzip.transforms.base import BaseTransform

TRANSFORMS = {
    "kvsharer": "kvzip.transforms.kvsharer:KVSharer",
    "quantize": "kvzip.transforms.quantize:Quantize",
}


def transform_class(name: str) -> type[BaseTransform]:
    """The class of that name. Raises UnknownNameError."""
    if name not in TRANSFORMS:
        raise UnknownNameError.of("transform", name, TRANSFORMS)
    module, cls = TRANSFORMS[name].split(":")
    found: type[BaseTransform] = getattr(import_module(module), cls)
    return found


def get_transform(part: Part) -> BaseTransform:
    """A new transform with the options of that part."""
    made: BaseTransform = part.call(transform_class(part.name))
    return made
