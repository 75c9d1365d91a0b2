"""`kvzip methods`: the ways to choose what stays, by name and in parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvzip.cli.options import Json, examples
from kvzip.cli.screen import out, print_json

if TYPE_CHECKING:
    from kvzip.parts import Option

EPILOG = examples(
    "kvzip methods",
    "kvzip compress book.txt -m qwen2.5-coder-0.5b --method snapkv:window_size=64,kernel_size=5",
    "kvzip compress book.txt -m qwen2.5-coder-0.5b --method window+pyramid:beta=10",
)
TITLES = {
    "recipe": "Recipe",
    "method": "Method",
    "scorer": "Scorer",
    "budget": "Budget",
    "transform": "Transform",
    "fetch": "Fetch",
}
NOTES = (
    "Write NAME, NAME:option=value,option=value, or SCORER+BUDGET+TRANSFORM+FETCH; a later part replaces an earlier "
    "one of its kind: kvzip+layer, kvzip+int4.",
    "No method sees a question here; those published with the question in view look from the end of the text instead.",
)


def methods(as_json: Json = False) -> None:
    """List the methods, and the scorers, budgets, transforms and fetches that they are made of."""
    rows = [*_recipes(), *_aliases(), *_scorers(), *_budgets(), *_transforms(), *_fetches()]
    if as_json:
        print_json(rows)
    else:
        _show(rows)


def _recipes() -> list[dict[str, Any]]:
    from kvzip.methods import parse_method
    from kvzip.recipes import RECIPES

    rows = []
    for name, recipe in RECIPES.items():
        method, about = parse_method(name), f"{recipe.help}; keeps {recipe.size.least:g} or more"
        rows.append(
            _row("recipe", name, method.composition, about, recipe.composition, sorted(method.needs), True, False, {})
        )
    return rows


def _aliases() -> list[dict[str, Any]]:
    from kvzip.methods import ALIASES, all_options, parse_method
    from kvzip.scorers import scorer_class

    rows = []
    for name, alias in ALIASES.items():
        method = parse_method(name)
        is_query_agnostic = method.scorer is None or scorer_class(method.scorer.name).is_query_agnostic
        about = alias.help, alias.source, sorted(method.needs), is_query_agnostic, method.decides_count
        rows.append(_row("method", name, method.composition, *about, all_options(name)))
    return rows


def _scorers() -> list[dict[str, Any]]:
    from kvzip.parts import options_of
    from kvzip.scorers import SCORERS, scorer_class

    rows = []
    for name in SCORERS:
        cls = scorer_class(name)
        about = cls.summary, cls.source, sorted(cls.needs), cls.is_query_agnostic
        rows.append(_row("scorer", name, None, *about, False, options_of(cls)))
    return rows


def _budgets() -> list[dict[str, Any]]:
    from kvzip.budget import BUDGET_KINDS
    from kvzip.parts import options_of

    rows = []
    for name, kind in BUDGET_KINDS.items():
        about = kind.help, kind.source, sorted(kind.needs), None, kind.decides_count
        rows.append(_row("budget", name, None, *about, options_of(kind.select)))
    return rows


def _transforms() -> list[dict[str, Any]]:
    from kvzip.parts import options_of
    from kvzip.transforms import TRANSFORMS, transform_class

    found = ((name, transform_class(name)) for name in TRANSFORMS)
    return [
        _row("transform", name, None, cls.summary, cls.source, [], None, False, options_of(cls)) for name, cls in found
    ]


def _fetches() -> list[dict[str, Any]]:
    from kvzip.fetch import FETCHES, fetch_class
    from kvzip.parts import options_of

    found = ((name, fetch_class(name)) for name in FETCHES)
    return [_row("fetch", name, None, cls.summary, cls.source, [], None, False, options_of(cls)) for name, cls in found]


def _row(
    kind: str,
    name: str,
    composition: str | None,
    description: str,
    source: str,
    needs: list[str],
    is_query_agnostic: bool | None,
    decides_count: bool,
    options: dict[str, Option],
) -> dict[str, Any]:
    """One entry of `--json`. The keys are a contract."""
    return {
        "kind": kind,
        "name": name,
        "composition": composition,
        "description": description,
        "needs": needs,
        "query_agnostic": is_query_agnostic,
        "decides_count": decides_count,
        "source": source,
        "options": {
            option.name: {"default": option.show(option.default), "allowed": option.allowed}
            for option in options.values()
        },
    }


def _show(rows: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console = out()
    for kind, title in TITLES.items():
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
        table.add_column(title, no_wrap=True)
        table.add_column("What stays" if kind == "method" else "")
        for row in (row for row in rows if row["kind"] == kind):
            about = Text(row["description"])
            about.append("".join(f"\n{line}" for line in _details(row)), style="dim")
            table.add_row(row["name"], about)
        console.print(table)
    for note in NOTES:
        console.print(note, style="dim")


def _details(row: dict[str, Any]) -> list[str]:
    """Needs and source in a line, and options in another."""
    facts = []
    if row["kind"] in ("method", "scorer") or row["needs"]:
        facts.append("needs " + (", ".join(row["needs"]).replace("_", " ") or "nothing"))
    if row["kind"] in ("method", "scorer"):
        facts += [] if row["query_agnostic"] else ["published with the question in view"]
    if row["decides_count"]:
        facts.append("decides itself how much to keep")
    options = " ".join(f"{name}={about['default'] or 'none'}" for name, about in row["options"].items())
    facts = ["; ".join([*facts, row["source"]])]
    return [*facts, f"options: {options}"] if options and row["kind"] != "method" else facts
