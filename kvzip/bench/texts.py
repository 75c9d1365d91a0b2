"""Texts to measure on."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from kvzip.errors import InputError
from kvzip.llm import LLM


def bench_text(llm: LLM, context_len: int, path: str | None = None) -> str:
    """About `context_len` tokens of text.

    path: a text file, or a SQuAD JSON file whose articles are joined; None = the bundled text, repeated if need be.
    Raises InputError for a file with too little text.
    """
    if context_len < 1:
        raise InputError(f"context length {context_len} is out of range: give at least 1 token")
    text = _bundled() if path is None else _read(Path(path))
    ids = llm.tokenize(text[: 12 * context_len])
    while path is None and len(ids) < context_len:
        text = f"{text}\n\n{text}"
        ids = llm.tokenize(text[: 12 * context_len])
    if len(ids) < context_len:
        raise InputError(f"{path} has {len(ids)} tokens: give a longer text, or --context-len {len(ids)}")
    return str(llm.tokenizer.decode(ids[:context_len]))


def bench_questions(path: str, text: str, count: int) -> list[str]:
    """`count` questions of a SQuAD JSON file on paragraphs that stand in `text`, spread evenly. Raises InputError."""
    found = [qa["question"] for p in _paragraphs(Path(path)) if p["context"] in text for qa in p["qas"]]
    if len(found) < count:
        raise InputError(f"{path} has {len(found)} questions about the text, {count} are needed: give more text")
    return [found[i * len(found) // count] for i in range(count)]


def _bundled() -> str:
    return files("kvzip").joinpath("data", "lighthouse.txt").read_text(encoding="utf-8")


def _read(path: Path) -> str:
    if path.suffix != ".json":
        return _text_of(path)
    return "\n\n".join(p["context"] for p in _paragraphs(path))


def _paragraphs(path: Path) -> list[dict[str, Any]]:
    """All paragraphs of a SQuAD JSON file, each with `context` and `qas`. Raises InputError."""
    try:
        articles = json.loads(_text_of(path))["data"]
        return [{"context": p["context"], "qas": p["qas"]} for article in articles for p in article["paragraphs"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a SQuAD JSON file ({error!r})") from error


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} can't be read as UTF-8 text ({error}): give a text or a SQuAD JSON file") from error
