"""Texts to measure on."""

from __future__ import annotations

from importlib.resources import files

from kvzip.errors import InputError
from kvzip.eval.tasks.base import choose
from kvzip.eval.tasks.squad import read_paragraphs
from kvzip.files import read_utf8
from kvzip.llm import LLM


def bench_text(llm: LLM, context_len: int, path: str | None = None) -> str:
    """About `context_len` tokens of text.

    path: a text file, or a SQuAD JSON file whose articles are joined; None = the bundled text, repeated if need be.
    Raises InputError for a file with too little text.
    """
    if context_len < 1:
        raise InputError(f"context length {context_len} is out of range: give at least 1 token")
    text = _bundled() if path is None else _read(path)
    ids = llm.tokenize(text[: 12 * context_len])
    while path is None and len(ids) < context_len:
        text = f"{text}\n\n{text}"
        ids = llm.tokenize(text[: 12 * context_len])
    if len(ids) < context_len:
        raise InputError(f"{path} has {len(ids)} tokens: give a longer text, or --context-len {len(ids)}")
    return str(llm.tokenizer.decode(ids[:context_len]))


def bench_questions(path: str, text: str, count: int, at_most: int = 0) -> list[str]:
    """Questions of a SQuAD JSON file on paragraphs that stand in `text`, spread evenly.

    As many as `count`, or up to `at_most` where there are more. Raises InputError for fewer than `count`.
    """
    found = [qa["question"] for p in read_paragraphs(path) if p["context"] in text for qa in p["qas"]]
    if len(found) < count:
        raise InputError(f"{path} has {len(found)} questions about the text, {count} are needed: give more text")
    return choose(found, max(count, min(at_most, len(found))))


def _bundled() -> str:
    return files("kvzip").joinpath("data", "lighthouse.txt").read_text(encoding="utf-8")


def _read(path: str) -> str:
    if not path.endswith(".json"):
        return read_utf8(path)
    return "\n\n".join(p["context"] for p in read_paragraphs(path))
