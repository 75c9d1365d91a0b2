"""Layers that use the keys and values of another one: the search, reading, answering, the file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import Reference
from tiny import SMALL, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import kvzip
from kvzip import store
from kvzip.backends import get_backend
from kvzip.chunks import RepeatPrompts
from kvzip.compress import Engine, FullContext
from kvzip.context import RaggedContext
from kvzip.errors import FormatError, InputError, ModelError
from kvzip.hf.cache import SessionCache
from kvzip.hf.geometry import probe
from kvzip.ops.ragged import pack_bits
from kvzip.ops.sharing import by_distance, joined, mean_states, search_shared
from kvzip.options import CompressOptions
from kvzip.profiles import profile_path
from kvzip.session import Session
from kvzip.sharing import find_shared_layers, load_shared_layers, passages, save_shared_layers

PROMPTS = RepeatPrompts(torch.arange(3, 9), torch.arange(9, 14), torch.arange(14, 18))
TEXT = "The quick brown fox jumps over the lazy dog. A lamp burned in the tower! Who saw it? " * 4
NOISE = {"atol": 2e-3, "rtol": 1e-3}
PREFIX_LEN, CONTEXT_LEN = 7, 90


def random_ids(seed: int, length: int) -> torch.Tensor:
    return torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(seed))


def llama(num_layers: int = 5) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL | {"num_hidden_layers": num_layers})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


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


# ---- the method


@pytest.fixture
def llm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> kvzip.LLM:
    monkeypatch.setenv("KVZIP_CACHE", str(tmp_path / "cache"))
    made = kvzip.wrap(llama(), tiny_tokenizer())
    save_shared_layers(made.fingerprint, {2: 0, 4: 3}, "a test")
    return made


def test_alone_it_evicts_nothing_and_holds_less(llm: kvzip.LLM) -> None:
    plain, sharing = llm.compress(TEXT, 1.0), llm.compress(TEXT, method="kvsharer")
    assert sharing.data.shared == {2: 0, 4: 3} and sharing.data.info.keep_ratio == 1.0
    assert sharing.data.kv_nbytes * 5 == plain.data.kv_nbytes * 3
    assert sharing.data.info.full_kv_nbytes == plain.data.info.full_kv_nbytes
    assert sharing.data.info.method == "kvsharer"


@pytest.mark.parametrize(
    "method", ["kvzip+kvsharer", "snapkv:window_size=8+kvsharer", "h2o+kvsharer+int4", "kvzip-plus+kvsharer"]
)
def test_it_composes_and_is_read_anew_by_what_was_read_without(llm: kvzip.LLM, method: str) -> None:
    options = CompressOptions(method=method, keep_ratio=0.5)
    prefilled = llm.prefill(TEXT)
    before = prefilled.compress(1.0).data
    later, at_once = prefilled.compress(options).data, llm.compress(TEXT, 0.5, method=method).data
    assert later.shared == at_once.shared == {2: 0, 4: 3}
    assert torch.equal(later.kept_bits, at_once.kept_bits)
    assert later.keep_mask.float().mean() == pytest.approx(0.5, abs=1e-3)
    assert len(prefilled._shared) == 1 and prefilled.compress(options) and len(prefilled._shared) == 1
    after = prefilled.compress(1.0).data
    assert not after.shared and torch.equal(before.layers[2].keys, after.layers[2].keys)


def test_a_map_of_no_layers_changes_nothing(llm: kvzip.LLM) -> None:
    save_shared_layers(llm.fingerprint, {}, "a test")
    plain, sharing = llm.compress(TEXT, 0.5), llm.compress(TEXT, 0.5, method="kvzip+kvsharer")
    assert torch.equal(plain.data.kept_bits, sharing.data.kept_bits)
    for a, b in zip(plain.data.layers, sharing.data.layers, strict=True):
        assert torch.equal(a.keys, b.keys)


@pytest.mark.parametrize("kind", ["head", "baklava"])
def test_other_profiles_leave_shared_layers_out(llm: kvzip.LLM, kind: str) -> None:
    llm.calibrate(kind, TEXT)
    method = {"head": "kvzip-head", "baklava": "kvzip+baklava"}[kind]
    data = llm.compress(TEXT, 0.5, method=f"{method}+kvsharer").data
    assert data.kept_shape[0] == 3 and data.shared == {2: 0, 4: 3}


def test_a_number_of_layers_is_for_sharing_alone(llm: kvzip.LLM) -> None:
    with pytest.raises(InputError, match="for kvsharer alone"):
        llm.calibrate("head", TEXT, num_layers=2)


@pytest.mark.parametrize("content", [None, "", "[]", '{"shared": [[1, 2]]}', '{"shared": [[2, "a"]]}', "OTHER"])
def test_a_profile_that_is_missing_or_does_not_fit_is_refused_before_any_work(
    llm: kvzip.LLM, content: str | None
) -> None:
    path = profile_path("kvsharer", llm.fingerprint)
    if content is None:
        path.unlink()
    else:
        other = json.dumps({"fingerprint": "another", "shared": [[2, 0]]})
        path.write_text(other if content == "OTHER" else content)
    with pytest.raises(ModelError, match=re.escape("kvzip calibrate --method kvsharer")) as caught:
        llm.compress(TEXT, method="kvsharer")
    assert "\n" not in str(caught.value)


def test_a_profile_that_was_found_is_the_one_that_is_used(llm: kvzip.LLM) -> None:
    llm.calibrate("kvsharer", TEXT, num_layers=2)
    assert len(load_shared_layers(llm.fingerprint, llm.geometry)) <= 2


def test_a_saved_session_goes_on_as_it_was(llm: kvzip.LLM, tmp_path: Path) -> None:
    context = llm.compress(TEXT, 0.5, method="kvzip+kvsharer")
    chat = context.session()
    chat.ask("Who?", max_new_tokens=4)
    chat.save(tmp_path / "chat.kvz")
    names = store_names(tmp_path / "chat.kvz")
    assert not {n for n in names if re.match(r"(layers|tail)\.[24]\.", n)} and "tail.3.keys" in names
    opened = llm.open_session(tmp_path / "chat.kvz")
    assert isinstance(opened, Session) and opened.context.data.shared == {2: 0, 4: 3}
    assert str(opened.ask("And why?", max_new_tokens=6)) == str(chat.ask("And why?", max_new_tokens=6))
    context.save(tmp_path / "a.kvz")
    llm.open(tmp_path / "a.kvz").save(tmp_path / "b.kvz")
    assert (tmp_path / "a.kvz").read_bytes() == (tmp_path / "b.kvz").read_bytes()
    empty = context.session()
    empty.save(tmp_path / "empty.kvz")
    assert llm.open_session(tmp_path / "empty.kvz").turns == []


def store_names(path: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return set(file.keys())


# ---- what a file says of shared layers


def said(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def open_with(path: Path, metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> RaggedContext:
    from safetensors.torch import save_file

    save_file(tensors, path, metadata)
    return store.read(path, verify=False)[0]


BAD_MAPS = [
    [], None, 1, "2", {"2": 3}, {"2": 2}, {"2": -1}, {"2": "0"}, {"2": True}, {"2": 0.0}, {"2": None}, {"2": [0]},
    {"a": 0}, {"02": 0}, {"5": 0}, {"-1": 0}, {"4": 2, "2": 0}, {"0": 0}, {}, {"2": 0}, {"2": 0, "4": 3, "1": 0},
]  # fmt: skip


@pytest.mark.parametrize("shared", BAD_MAPS, ids=str)
def test_a_map_that_can_not_be_is_refused(llm: kvzip.LLM, tmp_path: Path, shared: Any) -> None:
    llm.compress(TEXT, 0.5, method="kvzip+kvsharer").save(tmp_path / "a.kvz")
    metadata, tensors = said(tmp_path / "a.kvz")
    storage = json.loads(metadata["storage"])
    assert storage["shared"] == {"2": 0, "4": 3} and storage["levels"][2] == []
    metadata["storage"] = json.dumps(storage | {"shared": shared})
    with pytest.raises(FormatError) as caught:
        open_with(tmp_path / "b.kvz", metadata, tensors)
    assert "\n" not in str(caught.value)


def test_a_window_is_not_shared(llm: kvzip.LLM, tmp_path: Path) -> None:
    llm.compress(TEXT, 0.5, method="kvzip+kvsharer").save(tmp_path / "a.kvz")
    metadata, tensors = said(tmp_path / "a.kvz")
    for layer in (2, 0):
        windows = [8 if i == layer else None for i in range(5)]
        with pytest.raises(FormatError, match="sliding-window layer"):
            open_with(tmp_path / "b.kvz", metadata | {"windows": json.dumps(windows)}, tensors)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 6) | st.floats() | st.sampled_from(["0", "1", "2", "4", "x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(list("0123456a")), inner, max_size=4),
    max_leaves=6,
)


@given(content=json_values)
def test_any_map_is_refused_or_is_one_that_can_be(content: Any) -> None:
    try:
        shared = store.layout._shared_in(content, 5)
    except store.refusal.Refused:
        return
    assert all(0 <= source < layer < 5 and source not in shared for layer, source in shared.items())
    assert {str(layer): source for layer, source in shared.items()} == content
