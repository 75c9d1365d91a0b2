"""Real models and real text, loaded once a test run."""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # threads of several workers would wait for one another; before torch is there
    os.environ["OMP_NUM_THREADS"] = "1"

import kvzip

pytest_plugins = ["command_line", "stored"]  # the modules beside this one that have fixtures

REAL_MODELS = ("qwen2.5-coder-0.5b", "gemma3-270m", "smollm2-135m")  # the slowest first
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What shares a file and a model runs on one worker of pytest-xdist; real models first, they take longest."""
    for item in items:
        callspec = getattr(item, "callspec", None)
        model = callspec.params.get("llm", "") if callspec else ""
        item.add_marker(pytest.mark.xdist_group(f"{item.path.stem} {model}"))
    items.sort(key=lambda item: item.get_closest_marker("real") is None)


@lru_cache(maxsize=1)
def load_real(name: str) -> kvzip.LLM:
    """A real model; one at a time is kept, so tests are ordered by model."""
    return kvzip.load(name)


@pytest.fixture(params=REAL_MODELS, scope="session")
def llm(request: pytest.FixtureRequest) -> kvzip.LLM:
    return load_real(request.param)


@pytest.fixture(scope="session")
def smollm() -> kvzip.LLM:
    return load_real("smollm2-135m")


@pytest.fixture(scope="session")
def articles() -> list[dict]:
    """Articles of XQuAD: {title, text, questions: [(question, answer), ...]}."""
    path = SHARED_DATA / "xquad.en.dev.json"
    if not path.exists():
        assert not os.environ.get("CI"), "CI must have the shared data"
        pytest.skip("the shared XQuAD data is not beside this checkout")
    found = []
    for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
        pairs = [(q["question"], q["answers"][0]["text"]) for p in article["paragraphs"] for q in p["qas"]]
        text = "\n".join(p["context"] for p in article["paragraphs"])
        found.append({"title": article["title"], "text": text, "questions": pairs})
    return found
