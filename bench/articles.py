"""Articles of a SQuAD JSON file in two parts: a text to learn from, and a SQuAD JSON file that is held out."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("squad", type=Path, help="SQuAD JSON")
    parser.add_argument("--learn", required=True, metavar="FIRST-LAST", help="articles, counted from 0")
    parser.add_argument("--hold-out", required=True, metavar="FIRST-LAST")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of what is written")
    args = parser.parse_args()
    articles = json.loads(args.squad.read_text(encoding="utf-8"))["data"]
    args.output.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(text_of(article) for article in articles[between(args.learn)])
    held_out = json.dumps({"data": articles[between(args.hold_out)]})
    (args.output / f"{args.squad.stem}-{args.learn}.txt").write_text(text, encoding="utf-8")
    (args.output / f"{args.squad.stem}-{args.hold_out}.json").write_text(held_out, encoding="utf-8")


def text_of(article: dict[str, Any]) -> str:
    return "\n\n".join(paragraph["context"] for paragraph in article["paragraphs"])


def between(words: str) -> slice:
    """`0-9`, both ends included."""
    first, _, last = words.partition("-")
    return slice(int(first), int(last or first) + 1)


if __name__ == "__main__":
    main()
