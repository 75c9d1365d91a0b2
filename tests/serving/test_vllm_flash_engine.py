"""The GPU backend inside an engine on a CPU, with a plain function for the kernel: answers are those of kvzip itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import load_real

from kvzip.models.cache import model_folder

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM has an environment of its own"),
]

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TEXT = (ROOT / "kvzip" / "data" / "lighthouse.txt").read_text(encoding="utf-8")[:3000]
QUESTIONS = ["Who built the lighthouse?", "What is the name of the keeper?"]
MODEL, NUM_TOKENS = "smollm2-135m", 16  # of a step: prompts come in chunks, beside rows that decode
METHODS = {"plain": "kvzip", "refit": "kvzip+refit"}


def test_answers_are_those_of_kvzip(tmp_path: Path) -> None:
    llm = load_real(MODEL)
    requests, wanted = [], []
    for name, method in METHODS.items():
        context = llm.compress(TEXT, keep_ratio=0.4, method=method, certify=False)
        context.save(tmp_path / f"{name}.kvz")
        wanted += [context.ask(question, max_new_tokens=16) for question in QUESTIONS]
        requests += [{"context": name, "prompt": question, "max_tokens": 16} for question in QUESTIONS]
    requests.insert(1, {"context": None, "prompt": "The capital of France is", "max_tokens": 16})
    path = os.pathsep.join([str(ROOT), str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    added = {"PYTHONPATH": path, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0"}
    done = subprocess.run(
        [
            sys.executable,
            HERE / "flash_engine.py",
            model_folder(MODEL),
            tmp_path,
            json.dumps(requests),
            str(NUM_TOKENS),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **added},
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "answers.json").read_text(encoding="utf-8"))
    assert "Paris" in found[1][0]
    for together, alone in found:
        assert together == alone
    del found[1]
    assert [together.strip() for together, _ in found] == [answer.strip() for answer in wanted]
