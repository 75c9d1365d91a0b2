"""Ways to keep the full context in a file and fetch what each step needs, by name. An entry is a lazy string."""

from __future__ import annotations

FETCHES: dict[str, str] = {}
