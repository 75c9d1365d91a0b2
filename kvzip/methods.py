"""A method is a composition, named by a string: scorer + budget."""

from __future__ import annotations

from dataclasses import dataclass

from kvzip.budget import BUDGET_KINDS, BudgetKind, get_budget_kind
from kvzip.errors import UnknownNameError

ALIASES = {
    "kvzip": "reconstruction+global",
    "kvzip-head": "head-profile+head",
    "l2-norm": "key-norm+uniform",
    "streaming-llm": "sinks-recent+uniform",
}
SCORER_HELP = {
    "reconstruction": "largest attention a pair gets while the model repeats the context (arXiv 2505.23416)",
    "key-norm": "a small norm of the key (arXiv 2406.11430)",
    "sinks-recent": "the first four tokens and the last ones (StreamingLLM, arXiv 2309.17453)",
    "random": "chance, the same for the same shape",
    "head-profile": "one score a head, computed once per model by `kvzip profile-heads`",
}


@dataclass(frozen=True)
class Method:
    """A parsed method.  name: as the user wrote it.  scorer, budget: names of the parts."""

    name: str
    scorer: str
    budget: str

    @property
    def budget_kind(self) -> BudgetKind:
        return get_budget_kind(self.budget)

    @property
    def composition(self) -> str:
        """The canonical name: all parts spelled out."""
        return f"{self.scorer}+{self.budget}"


def parse_method(text: str) -> Method:
    """`kvzip`, `kvzip+uniform`, `reconstruction+layer`: names joined by `+`; a later part replaces an earlier one.

    Raises UnknownNameError with the nearest name.
    """
    parts: dict[str, str] = {"budget": "global"}
    for name in "+".join(ALIASES.get(part.strip(), part.strip()) for part in text.split("+")).split("+"):
        if name in SCORER_HELP:
            parts["scorer"] = name
        elif name in BUDGET_KINDS:
            parts["budget"] = name
        else:
            raise UnknownNameError.of("method", name, [*ALIASES, *SCORER_HELP, *BUDGET_KINDS])
    scorer = get_budget_kind(parts["budget"]).scorer or parts.get("scorer")
    if scorer is None:
        raise UnknownNameError(f"method {text!r} has no scorer: put one of {', '.join(SCORER_HELP)} before the budget")
    return Method(text, scorer, parts["budget"])
