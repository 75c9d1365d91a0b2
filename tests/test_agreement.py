"""The pure functions of bench/agreement.py, without kvpress."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

import kvzip

sys.path.append(str(Path(__file__).parents[1] / "bench"))
import agreement
from agreement import Ours, Side


def test_the_line_of_kvpress() -> None:
    assert agreement.pyramid_line(400, 0.5, 3, 8, falls_back=True) == [390, 200, 10]
    assert agreement.pyramid_line(400, 0.1, 3, 8, falls_back=True) == [40, 40, 40]  # the last would get 2 of 8
    assert agreement.pyramid_line(400, 0.1, 3, 8, falls_back=False) == [78, 40, 2]


def test_sides_are_compared_head_by_head_over_the_tokens_of_both() -> None:
    first = torch.tensor([[[9.0, 1.0, 2.0, 3.0], [9.0, 1.0, 2.0, 3.0]]])
    second = torch.tensor([[[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]])
    sides = [Side(s, dict.fromkeys(agreement.KEEP_RATIOS, s >= 3)) for s in (first, second)]
    found = agreement.compare(*sides)
    assert found["spearman"] == pytest.approx([0, -1])
    assert found["overlap"]["0.3"] == [0.5, 0.0]
    assert found["difference"] == pytest.approx(2 / 3)


def test_sinks_of_expected_attention_may_stand_in_the_context() -> None:
    """They are left out of statistics and softmax wherever the prefix ends."""
    llm = kvzip.wrap(tiny_model("llama", seed=3), tiny_tokenizer())
    ids = torch.randint(3, 300, (60,), generator=torch.Generator().manual_seed(0))
    ours = Ours(llm, ids[:4], ids[4:])
    counted, apart = ours.scores("counted", "expected+uniform"), ours.scores("apart", "expected+uniform")
    torch.testing.assert_close(counted[..., 4:], apart, atol=1e-5, rtol=1e-3)
