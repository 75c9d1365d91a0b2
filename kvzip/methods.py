"""A method is a composition, named by a string: scorer + budget + transforms, each with its options."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from kvzip.budget import BUDGET_KINDS, BudgetKind, Size, get_budget_kind
from kvzip.errors import InputError, UnknownNameError
from kvzip.fetch import FETCHES, fetch_class
from kvzip.parts import Option, Part, make_part, options_of, split_part, unknown_option
from kvzip.recipes import RECIPES
from kvzip.scorers import SCORERS, scorer_class
from kvzip.transforms import TRANSFORMS, get_transform, transform_class


@dataclass(frozen=True)
class Alias:
    """A composition that the literature knows by a name."""

    composition: str
    help: str
    source: str


ALIASES = {
    "adakv": Alias(
        "window+adakv", "SnapKV's scores; heads of a layer compete, none is left bare", "Ada-KV, arXiv 2407.11550"
    ),
    "baklava": Alias(
        "sinks-recent+baklava", "recent tokens, in each head by its importance", "BaKlaVa, arXiv 2502.13176"
    ),
    "duo-attention": Alias(
        "sinks-recent+duo",
        "all of heads that look far back, recent tokens of the others",
        "DuoAttention, arXiv 2410.10819",
    ),
    "clusterkv": Alias(
        "clusters", "all pairs, in a file; each step fetches what its query needs", "ClusterKV, arXiv 2412.03213"
    ),
    "expected-attention": Alias(
        "expected:epsilon=0.01+adakv",
        "what future queries are expected to look at, times the size of the value",
        "Expected Attention, arXiv 2510.00636",
    ),
    "h2o": Alias("accumulated+uniform", "what got most attention in sum, and the last tokens", "H2O, arXiv 2306.14048"),
    "int2": Alias("quantize:key_bits=2,value_bits=2", "all pairs, in 2 bits a number", "KIVI, arXiv 2402.02750"),
    "int4": Alias("quantize", "all pairs, in 4 bits a number, keys by channel", "KIVI, arXiv 2402.02750"),
    "int8": Alias(
        "quantize:key_bits=8,value_bits=8,key_axis=token", "all pairs, in 8 bits a number", "KIVI, arXiv 2402.02750"
    ),
    "k8v4": Alias(
        "quantize:key_bits=8,key_axis=token", "all pairs, keys in 8 bits and values in 4", "DiffKV, arXiv 2412.03131"
    ),
    "kvzip": Alias(
        "reconstruction+global", "what the model needs to repeat the text (the default)", "KVzip, arXiv 2505.23416"
    ),
    "kvzip-fast": Alias(
        "distilled+floored:alpha=0.5",
        "kvzip without a replay: scores foretold while the text is read",
        "KVzap, arXiv 2601.07891",
    ),
    "kvzip-head": Alias("head-profile+head", "whole heads, by a profile of the model", "KVzip, arXiv 2505.23416"),
    "kvzip-plus": Alias(
        "reconstruction-plus+global", "kvzip, times what a pair adds to the stream", "KVzip+, arXiv 2601.07891"
    ),
    "l2-norm": Alias("key-norm+uniform", "small key norms", "L2-norm, arXiv 2406.11430"),
    "leankv": Alias(
        "mean-attention+threshold:threshold=0.02+levels",
        "what gets attention, the most of it in more bits",
        "LeanKV, arXiv 2412.03131",
    ),
    "pyramidkv": Alias(
        "window:window_size=8+pyramid", "SnapKV's scores; lower layers keep more", "PyramidKV, arXiv 2406.02069"
    ),
    "refreekv": Alias(
        "suffix-loss+threshold",
        "the last tokens, as many as the very last looks at",
        "ReFreeKV, arXiv 2502.16886",
    ),
    "snapkv": Alias("window+uniform", "what the last tokens look at, and its neighbours", "SnapKV, arXiv 2404.14469"),
    "streaming-llm": Alias("sinks-recent+uniform", "the first and the last tokens", "StreamingLLM, arXiv 2309.17453"),
    "tova": Alias("last-query+uniform", "what the last token looks at", "TOVA, arXiv 2401.06104"),
}


@dataclass(frozen=True)
class Method:
    """A parsed method.

    name: as the user wrote it.  scorer, budget: what is evicted; None where all pairs stay.  transforms: what is done
    to the pairs that stay, in this order.  fetch: how pairs are recalled at each step, or None.  size: of a recipe,
    what is kept where nothing else is asked for.
    """

    name: str
    scorer: Part | None
    budget: Part | None
    transforms: tuple[Part, ...] = ()
    fetch: Part | None = None
    size: Size | None = None

    @property
    def budget_kind(self) -> BudgetKind | None:
        return None if self.budget is None else get_budget_kind(self.budget.name)

    @property
    def needs(self) -> frozenset[str]:
        """What its parts are to be shown: names of `kvzip.scorers.base.NEEDS`."""
        return frozenset().union(
            scorer_class(self.scorer.name).needs if self.scorer else (),
            self.budget_kind.needs if self.budget_kind else (),
        )

    @property
    def decides_count(self) -> bool:
        """Whether its budget decides itself how much to keep."""
        return self.budget_kind is not None and self.budget_kind.decides_count

    @property
    def shares_layers(self) -> bool:
        """Whether some layers are read and stored with the keys and values of another one."""
        return any(transform_class(part.name).shares_layers for part in self.transforms)

    @property
    def needs_scores(self) -> bool:
        """Whether pairs are stored by their scores, so that these are needed even where all pairs stay."""
        return any(transform_class(part.name).needs_scores for part in self.transforms)

    @property
    def needs_queries(self) -> bool:
        """Whether a transform is to be shown queries of the replay."""
        return any(get_transform(part).needs_queries for part in self.transforms)

    @property
    def composition(self) -> str:
        """The canonical name: all parts spelled out, with the options that differ from their defaults."""
        parts = (self.scorer, self.budget, *self.transforms, self.fetch)
        return "+".join(str(part) for part in parts if part is not None)


def parse_method(text: str) -> Method:
    """`kvzip`, `snapkv:window_size=64,kernel_size=5`, `window+pyramid:beta=10+int4`: parts joined by `+`.

    An alias stands for its parts, and its options go to the part that has them; a later part replaces an earlier one of
    the same kind, and transforms of different names add up; a name that is an alias and a budget (`adakv`) is the
    budget beside other parts.  `kvzip:small` is a recipe, a composition with a size.
    Without a budget: `global`.  Without a scorer nothing is evicted.
    Raises UnknownNameError with the nearest name, or InputError for an option that can't be.
    """
    chosen: dict[str, Part] = {}
    transforms: dict[str, Part] = {}
    words = [word.strip() for word in text.split("+")]
    for word in words:
        for name, given in _expand(word, alone=len(words) == 1):
            slot, function = _find(name)
            part = make_part(name, function, given)
            if slot == "transform":
                transforms[name] = part
            else:
                chosen[slot] = part
    budget = chosen.get("budget")
    own = None if budget is None else get_budget_kind(budget.name).scorer
    scorer = Part(own) if own else chosen.get("scorer")
    if scorer is None and budget is not None:
        raise UnknownNameError(f"method {text!r} has no scorer: put one of {', '.join(SCORERS)} before the budget")
    if scorer is not None and budget is None:
        budget = Part("global")
    if "fetch" in chosen and transforms:
        raise InputError(
            f"method {text!r} can't be: fetched pairs are stored as they are; leave {next(iter(transforms))!r} out"
        )
    in_order = tuple(transforms[name] for name in TRANSFORMS if name in transforms)
    coding = [part.name for part in in_order if transform_class(part.name).stores_codes]
    if len(coding) > 1:
        raise InputError(f"method {text!r} can't be: {' and '.join(coding)} both decide the bits; leave one out")
    kinds = {part.name: transform_class(part.name) for part in in_order}
    behind = [name for name, kind in kinds.items() if kind.needs_scores or kind.needs_queries]
    if scorer is None and behind:
        raise UnknownNameError(f"method {text!r} has no scorer: put one of {', '.join(SCORERS)} before {behind[0]!r}")
    size = next((RECIPES[word].size for word in words if word in RECIPES), None)
    return Method(text, scorer, budget, in_order, chosen.get("fetch"), size)


def split_methods(text: str) -> tuple[str, ...]:
    """Methods joined by commas, as `h2o,snapkv:window_size=64,kernel_size=5`: an `option=` goes on with its method."""
    return tuple(word.strip() for word in re.split(r",(?!\s*\w+=)", text) if word.strip())


def all_options(name: str) -> dict[str, Option]:
    """The options of a method's name or of a part's, with the defaults that hold there. Raises UnknownNameError."""
    found: dict[str, Option] = {}
    for part, given in _expand(name, alone=True):
        for option in options_of(_find(part)[1]).values():
            own = option.read(part, given[option.name]) if option.name in given else option.default
            found[option.name] = replace(option, default=own)
    return found


def _expand(word: str, alone: bool) -> list[tuple[str, dict[str, str]]]:
    """The parts that a word stands for, with their options as text."""
    if word in RECIPES:
        return [part for name in RECIPES[word].composition.split("+") for part in _expand(name, alone=False)]
    if word.startswith("kvzip:") and "=" not in word:
        raise UnknownNameError.of("recipe", word, RECIPES)
    name, given = split_part(word)
    if name not in ALIASES or (name in BUDGET_KINDS and not alone):
        return [(name, given)]
    parts = [split_part(part) for part in ALIASES[name].composition.split("+")]
    homes = {option: options for part, options in parts for option in options_of(_find(part)[1])}
    for option, value in given.items():
        if option not in homes:
            raise unknown_option(name, option, homes)
        homes[option][option] = value
    return parts


def _find(name: str) -> tuple[str, Callable[..., Any]]:
    """Which slot a part fills, and what declares its options. Raises UnknownNameError."""
    if name in SCORERS:
        return "scorer", scorer_class(name)
    if name in BUDGET_KINDS:
        return "budget", BUDGET_KINDS[name].select
    if name in TRANSFORMS:
        return "transform", transform_class(name)
    if name in FETCHES:
        return "fetch", fetch_class(name)
    raise UnknownNameError.of("method", name, {*ALIASES, *SCORERS, *BUDGET_KINDS, *TRANSFORMS, *FETCHES})
