"""Ways to keep the full context in a file and fetch what each step needs, by name. An entry is a lazy string."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from kvzip.errors import UnknownNameError
from kvzip.parts import Part

if TYPE_CHECKING:
    from kvzip.fetch.base import BaseFetch

FETCHES = {
    "clusters": "kvzip.fetch.clusters:ClusterFetch",
}


def fetch_class(name: str) -> type[BaseFetch]:
    """The class of that name. Raises UnknownNameError."""
    if name not in FETCHES:
        raise UnknownNameError.of("fetch", name, FETCHES)
    module, cls = FETCHES[name].split(":")
    found: type[BaseFetch] = getattr(import_module(module), cls)
    return found


def get_fetch(part: Part) -> BaseFetch:
    """A new fetch with the options of that part."""
    made: BaseFetch = part.call(fetch_class(part.name))
    return made
