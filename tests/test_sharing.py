"""Layers that use the keys and values of another one: reading, answering, the search."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import Reference
from tiny import llama, tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from kvzip.backends import get_backend
from kvzip.chunks import RepeatPrompts
from kvzip.compress import Engine, FullContext
from kvzip.context import RaggedContext
from kvzip.errors import InputError, ModelError
from kvzip.hf.cache import SessionCache
from kvzip.hf.geometry import probe
from kvzip.ops.ragged import pack_bits
from kvzip.ops.sharing import by_distance, joined, mean_states, search_shared
from kvzip.sharing import find_shared_layers, passages

PROMPTS = RepeatPrompts(torch.arange(3, 9), torch.arange(9, 14), torch.arange(14, 18))
TEXT = "The quick brown fox jumps over the lazy dog. A lamp burned in the tower! Who saw it? " * 4
NOISE = {"atol": 2e-3, "rtol": 1e-3}
PREFIX_LEN, CONTEXT_LEN = 7, 90


def random_ids(seed: int, length: int) -> torch.Tensor:
    return torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(seed))


# ---- the reference: a plain forward pass in which some layers are handed the keys and values of others


def logits_by_hooks(model: PreTrainedModel, ids: torch.Tensor, last: int, shared: dict[int, int]) -> torch.Tensor:
    """[last, V]: all of `ids` [T] in one pass without a cache; a shared layer's projections give its source's output,
    which a rotation at the same positions turns into the source's keys."""
    kept: dict[tuple[int, str], torch.Tensor] = {}

    def hook_of(layer: int, name: str) -> Callable[..., torch.Tensor]:
        def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            kept[layer, name] = kept[shared[layer], name] if layer in shared else output
            return kept[layer, name]

        return hook

    with ExitStack() as stack, torch.inference_mode(), Reference(model):
        for index, layer in enumerate(model.model.layers):
            for name in ("k_proj", "v_proj"):
                handle = getattr(layer.self_attn, name).register_forward_hook(hook_of(index, name))
                stack.callback(handle.remove)
        return model(ids[None], use_cache=False, logits_to_keep=last).logits[0]


def context_of(engine: Engine, mask: torch.Tensor | None = None, block_len: int = 32) -> RaggedContext:
    full = FullContext(engine, random_ids(0, PREFIX_LEN), random_ids(1, CONTEXT_LEN))
    full.prefill(block_len)
    kept = torch.ones(len(engine.geometry.full_layers), 2, CONTEXT_LEN, dtype=torch.bool) if mask is None else mask
    return RaggedContext(full.evict(kept), full.prefix_ids.int(), full.context_ids.int(), pack_bits(kept), None, None)


def engine_of(model: PreTrainedModel, shared: dict[int, int]) -> Engine:
    return Engine(model, probe(model).sharing(shared), get_backend(), PROMPTS)


@pytest.mark.parametrize("shared", [{}, {1: 0}, {3: 1, 4: 1}, {2: 0, 4: 3}, {1: 0, 2: 0, 3: 0, 4: 0}])
def test_prefill_and_decode_equal_a_model_with_shared_projections(shared: dict[int, int]) -> None:
    model, question = llama(), random_ids(2, 20)
    engine = engine_of(model, shared)
    cache = SessionCache(context_of(engine), engine.backend)
    with torch.inference_mode():
        parts = [question[:12], *question[12:].split(1)]  # a block, then token by token
        ours = torch.cat([model(input_ids=part[None], past_key_values=cache).logits[0] for part in parts])
    whole = torch.cat([random_ids(0, PREFIX_LEN), random_ids(1, CONTEXT_LEN), question])
    torch.testing.assert_close(ours, logits_by_hooks(model, whole, 20, shared), **NOISE)
    if shared:
        assert (ours - logits_by_hooks(model, whole, 20, {})).abs().max() > 0.1  # sharing matters


def test_blocks_of_any_size_read_the_same() -> None:
    engine = engine_of(llama(), {2: 0, 4: 3})
    for a, b in zip(context_of(engine, block_len=1).layers, context_of(engine, block_len=500).layers, strict=True):
        torch.testing.assert_close(a.keys, b.keys, **NOISE)


@pytest.mark.parametrize("local", [False, True])
def test_scores_are_those_of_the_queries_of_layers_that_store(local: bool) -> None:
    """By hooks again: a replay of one chunk is a forward pass over prefix, context and replay."""
    shared, model = {2: 0, 3: 0}, llama()
    engine = engine_of(model, shared)
    full = FullContext(engine, random_ids(0, PREFIX_LEN), random_ids(1, CONTEXT_LEN))
    full.prefill(32)
    ours = full.score("reconstruction", CONTEXT_LEN, local=local)
    (_, replayed), *_ = full._replays([slice(0, CONTEXT_LEN)])
    from reference import STATE

    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    whole = torch.cat([full.prefix_ids, full.context_ids, replayed])
    original = Reference.__exit__

    def keep(self: Reference, *exc: object) -> None:
        seen.update(STATE.seen)
        original(self, *exc)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reference, "__exit__", keep)
        logits_by_hooks(model, whole, 1, shared)
    rows = []
    for layer in (0, 1, 4):
        query, keys = (t[0] for t in seen[layer])
        logits = query[:, -len(replayed) :] @ keys.repeat_interleave(2, 0).transpose(1, 2) / 4
        future = torch.ones(len(replayed), len(whole), dtype=torch.bool).triu(1 + len(whole) - len(replayed))
        weights = logits.masked_fill(future, -torch.inf).softmax(-1)[:, :, PREFIX_LEN : PREFIX_LEN + CONTEXT_LEN]
        rows.append(weights.reshape(2, -1, CONTEXT_LEN).amax(1))
    torch.testing.assert_close(ours, torch.stack(rows), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "scorer", ["window:window_size=8", "accumulated:num_recent=4", "reconstruction-plus", "key-norm"]
)
def test_every_kind_of_scorer_sees_the_layers_that_store(scorer: str) -> None:
    engine = engine_of(llama(), {2: 0, 4: 3})
    full = FullContext(engine, random_ids(0, PREFIX_LEN), random_ids(1, CONTEXT_LEN))
    full.prefill(32, scorer_name=scorer)
    at_once = full.score(scorer, 40)
    later = FullContext(engine, full.prefix_ids, full.context_ids)
    later.prefill(32)
    again = later.score(scorer, 40)
    assert at_once.shape == (3, 2, CONTEXT_LEN)
    torch.testing.assert_close(at_once, again, atol=1e-4, rtol=1e-3)
    for layer in later.cache.stored.values():
        assert layer.length == PREFIX_LEN + CONTEXT_LEN and layer.replayed is None


def test_eviction_holds_for_all_layers_that_use_the_pairs() -> None:
    engine = engine_of(llama(), {2: 0, 4: 3})
    mask = torch.rand(3, 2, CONTEXT_LEN, generator=torch.Generator().manual_seed(1)) < 0.4
    data = context_of(engine, mask)
    assert data.shared == {2: 0, 4: 3} and data.full_layers == (0, 1, 3)
    assert data.layers[2] is data.layers[0] and data.layers[4] is data.layers[3]
    assert data.kv_nbytes == sum(data.layers[i].nbytes for i in (0, 1, 3))
    assert [sum(heads) > 0 for heads in data.pairs_per_head] == [True, True, False, True, False]
    assert torch.equal(data.keep_mask, mask)
    moved = data.to("cpu", torch.float64)
    assert moved.shared == data.shared and moved.layers[2] is moved.layers[0] and moved.dtype == torch.float64


def test_two_identical_layers_share_without_a_change() -> None:
    """Layer 1 puts nothing into the stream, so layer 2 sees what layer 1 saw; with its weights, sharing changes nothing."""
    model = llama(3)
    one, two = model.model.layers[1], model.model.layers[2]
    two.load_state_dict(one.state_dict())
    with torch.no_grad():
        one.self_attn.o_proj.weight.zero_()
        one.mlp.down_proj.weight.zero_()
    question = random_ids(2, 20)
    found = []
    for shared in ({}, {2: 1}, {2: 0}):
        engine = engine_of(model, shared)
        cache = SessionCache(context_of(engine), engine.backend)
        with torch.inference_mode():
            found.append(model(input_ids=question[None], past_key_values=cache).logits[0])
    assert torch.equal(found[0], found[1]) or torch.allclose(found[0], found[1], **NOISE)
    assert (found[0] - found[2]).abs().max() > 0.1


def test_tails_are_held_once_and_rewound_once() -> None:
    model, question = llama(), random_ids(2, 20)
    plain, sharing = (engine_of(model, shared) for shared in ({}, {2: 0, 4: 3}))
    caches = [SessionCache(context_of(engine), engine.backend) for engine in (plain, sharing)]
    with torch.inference_mode():
        first = [model(question[None], past_key_values=cache).logits for cache in caches]
        for cache in caches:
            cache.rewind(5)
        again = [model(question[None, 5:], past_key_values=cache).logits for cache in caches]
    assert caches[1].tail_len == 20 and caches[1].tail_nbytes * 5 == caches[0].tail_nbytes * 3
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(a[:, 5:], b, **NOISE)


def test_batches_and_beams_share_too() -> None:
    model, question = llama(), random_ids(2, 12)
    engine = engine_of(model, {2: 0, 4: 3})
    data = context_of(engine)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    alone = model.generate(question[None], past_key_values=SessionCache(data, engine.backend), **options)
    both = model.generate(question[None].repeat(2, 1), past_key_values=SessionCache(data, engine.backend), **options)
    assert both[0].tolist() == both[1].tolist() == alone[0].tolist()
    beams = model.generate(question[None], past_key_values=SessionCache(data, engine.backend), num_beams=3, **options)
    assert beams.shape == alone.shape


# ---- which layers may share


def test_only_full_layers_with_the_same_rotation_share() -> None:
    geometry = probe(tiny_model("gemma3"))  # sliding, full, sliding, full
    pairs = [(i, j) for i in range(4) for j in range(4) if geometry.can_share(i, j)]
    assert pairs == [(3, 1)]
    turned = replace(geometry.layers[3], inv_freq=geometry.layers[3].inv_freq * 2)
    assert not replace(geometry, layers=(*geometry.layers[:3], turned)).can_share(3, 1)
    for bad in ({1: 3}, {2: 0}, {3: 0}, {3: 3}, {3: -1}, {9: 1}):
        with pytest.raises(ModelError, match="can't use the keys"):
            geometry.sharing(bad)


def test_a_chain_is_refused() -> None:
    with pytest.raises(ModelError, match="not shared itself"):
        probe(llama(3)).sharing({2: 1, 1: 0})


# ---- the search


def test_states_and_distances_by_hand() -> None:
    def state(key: float, value: float) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((1, 1, 2), key), torch.full((1, 1, 2), value)

    caches = [[state(0, 0), state(2, 4), state(1, 1)], [state(0, 2), state(4, 2), state(1, 1)]]
    states = mean_states(caches)
    assert [x.tolist() for x in states] == [[0.5, 0.5], [3.0, 3.0], [1.0, 1.0]]
    assert by_distance([(1, 0), (2, 0), (2, 1)], dict(enumerate(states))) == [(1, 0), (2, 1), (2, 0)]


def test_the_search_by_hand() -> None:
    tried: list[dict[int, int]] = []

    def similarity(shared: dict[int, int]) -> float:
        tried.append(shared)
        return 0.5 if shared.get(3) == 0 else 0.9  # exactly the threshold is not enough

    pairs = [(3, 0), (3, 2), (3, 1), (2, 1), (1, 0)]
    assert search_shared(pairs, 3, similarity, 0.5) == {3: 1, 2: 1}
    assert tried == [{3: 0}, {3: 2}, {3: 1, 2: 1}, {3: 0, 2: 0, 1: 0}]
    assert search_shared(pairs, 0, similarity, 0.5) == {}
    assert search_shared(pairs, 1, lambda shared: 1.0, 0.5) == {3: 0}
    assert search_shared(pairs, 9, lambda shared: 0.0, 0.5) == {}


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 8)).filter(lambda p: p[0] > p[1]), max_size=40))
def test_no_map_has_a_chain(pairs: list[tuple[int, int]]) -> None:
    shared: dict[int, int] = {}
    for layer, source in pairs:
        if layer not in shared:
            before = len(shared)
            shared = joined(shared, layer, source)
            assert len(shared) == before + 1
    assert all(source < layer and source not in shared for layer, source in shared.items())


def test_the_search_of_a_model() -> None:
    model = llama()
    engine = engine_of(model, {})
    texts = [random_ids(i, 64) for i in range(3)]
    assert find_shared_layers(engine, texts, 0) == {}
    found = find_shared_layers(engine, texts, 2, threshold=-1.0)
    assert len(found) == 2 and len(engine.geometry.sharing(found).full_layers) == 3
    farthest = farthest_pair(model, texts)
    assert find_shared_layers(engine, texts, 1, threshold=-1.0) == {farthest[0]: farthest[1]}
    assert find_shared_layers(engine, texts, 4, threshold=1.1) == {}
    assert len(find_shared_layers(engine, texts, threshold=-1.0)) == 1  # by default an eighth, at least one
    for bad in (-1, 5):
        with pytest.raises(InputError, match="0 to 4 layers"):
            find_shared_layers(engine, texts, bad)


def farthest_pair(model: PreTrainedModel, texts: list[torch.Tensor]) -> tuple[int, int]:
    """By transformers' own caches."""
    with torch.inference_mode():
        caches = [model(ids[None], use_cache=True).past_key_values for ids in texts]
    count = len(caches[0].layers)
    vectors = [
        torch.stack([(c.layers[i].keys + c.layers[i].values).flatten() / 2 for c in caches]).mean(0)
        for i in range(count)
    ]
    pairs = [(i, j) for i in range(count) for j in range(i)]
    return max(pairs, key=lambda pair: float((vectors[pair[0]] - vectors[pair[1]]).norm()))


def test_passages_have_one_length_and_begin_at_sentences() -> None:
    tokenizer = tiny_tokenizer()
    found = passages(tokenizer, TEXT)
    assert {len(ids) for ids in found} == {64} and len(found) <= 30
    assert tokenizer.decode(found[0]).startswith("The quick") and tokenizer.decode(found[1]).startswith("A lamp")
    with pytest.raises(InputError, match="at least 64 tokens"):
        passages(tokenizer, "Too short.")
