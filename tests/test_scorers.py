"""Scorers that need no replay: what they keep is known beforehand."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

import kvzip
from kvzip.methods import parse_method

NUM_SINKS = 4

TEXT = "The quick brown fox jumps over the lazy dog. " * 6


@pytest.fixture(scope="module", params=["qwen2", "gemma3"])
def prefilled(request: pytest.FixtureRequest) -> kvzip.Prefilled:
    return kvzip.wrap(tiny_model(request.param, seed=3), tiny_tokenizer()).prefill(TEXT)


def kept(prefilled: kvzip.Prefilled, method: str, keep_ratio: float = 0.3) -> torch.Tensor:
    data = prefilled.compress(kvzip.CompressOptions(keep_ratio=keep_ratio, method=method)).data
    assert data.keep_mask.sum() == round(keep_ratio * data.keep_mask.numel())
    return data.keep_mask


def test_streaming_keeps_sinks_and_the_most_recent(prefilled: kvzip.Prefilled) -> None:
    mask = kept(prefilled, "streaming-llm")
    context_len, count = mask.shape[-1], int(mask[0, 0].sum())
    expected = torch.zeros(context_len, dtype=torch.bool)
    expected[:NUM_SINKS] = True
    expected[context_len - (count - NUM_SINKS) :] = True
    assert torch.equal(mask[0, 0], expected)
    counts = mask.sum(-1)
    assert counts.max() - counts.min() <= 1
    assert (mask[..., :NUM_SINKS]).all() and mask[..., -1].all()


def test_small_key_norms_are_kept(prefilled: kvzip.Prefilled) -> None:
    mask, full = kept(prefilled, "l2-norm"), prefilled._full
    start = full.prefix_ids.numel()
    for index, layer in enumerate(full.engine.geometry.full_layers):
        norms = full.cache.layers[layer].keys[0, :, start : full.length].norm(dim=-1)
        for head, row in enumerate(mask[index]):
            assert norms[head][row].max() <= norms[head][~row].min()


def test_the_norm_of_a_key_does_not_depend_on_its_position(prefilled: kvzip.Prefilled) -> None:
    """The packed keys stand in another rotation and have the same norms."""
    scores = prefilled.scores(parse_method("l2-norm"))
    data = prefilled.compress(1.0).data
    for index, layer in enumerate(data.full_layers):
        norms = data.layers[layer].keys.norm(dim=-1).reshape(scores.shape[1], -1)[:, data.prefix_len :]
        torch.testing.assert_close(-norms, scores[index], atol=1e-5, rtol=1e-5)


def test_chance_is_the_same_again_and_has_no_pattern(prefilled: kvzip.Prefilled) -> None:
    first, again = kept(prefilled, "random"), kept(prefilled, "random")
    assert torch.equal(first, again)
    assert not torch.equal(first[0, 0], first[0, 1])
    shares = first.float().mean(dim=(0, 1))  # by position
    assert abs(shares[: len(shares) // 2].mean() - shares[len(shares) // 2 :].mean()) < 0.15


@pytest.mark.parametrize("method", ["random", "l2-norm", "streaming-llm"])
def test_everything_kept_is_the_full_cache_whatever_the_method(prefilled: kvzip.Prefilled, method: str) -> None:
    options = kvzip.CompressOptions(keep_ratio=1.0, method=method)
    found = prefilled.compress(options).ask("why?", max_new_tokens=5)
    assert found.token_ids == prefilled.compress(1.0).ask("why?", max_new_tokens=5).token_ids


def test_methods_without_a_replay_do_not_replay(prefilled: kvzip.Prefilled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(prefilled._full), "replay", lambda *args, **kwargs: pytest.fail("replayed"))
    for method in ("random+layer", "key-norm", "sinks-recent+global"):
        kept(prefilled, method, 0.4)
