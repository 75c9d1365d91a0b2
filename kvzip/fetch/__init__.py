"""Ways to keep the full context in a file and fetch what each step needs, by name. An entry is a lazy string."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvzip.parts import Part, named

if TYPE_CHECKING:
    from kvzip.fetch.base import BaseFetch

FETCHES = {
    "clusters": "kvzip.fetch.clusters:ClusterFetch",
}


def fetch_class(name: str) -> type[BaseFetch]:
    """The class of that name. Raises UnknownNameError."""
    found: type[BaseFetch] = named("fetch", name, FETCHES)
    return found


def get_fetch(part: Part) -> BaseFetch:
    """A new fetch with the options of that part."""
    made: BaseFetch = part.call(fetch_class(part.name))
    return made
