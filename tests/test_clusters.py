"""Fetching clusters at each step (ClusterKV): the parts, the file, and the equalities that must hold."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from random_context import INFO, Shape, random_context
from tiny import tiny_model, tiny_tokenizer
from torch import Tensor

import kvzip
from kvzip import store
from kvzip.backends import get_backend
from kvzip.cli.answers import answer_json
from kvzip.context import RaggedContext, RaggedLayer
from kvzip.errors import FormatError, InputError
from kvzip.fetch.clusters import ClusterFetch
from kvzip.fetch.resident import FetchStats, Resident
from kvzip.hf.cache import SessionCache
from kvzip.inspect.summary import facts, inspect_json
from kvzip.methods import parse_method
from kvzip.ops.clusters import cluster_keys, cluster_scores, nearest, rows_of_runs, take_clusters

NOISE = {"atol": 2e-3, "rtol": 1e-3}
TEXT = " ".join(
    f"In year {1000 + 37 * i % 900} the ship {chr(65 + i % 26)}{i} sailed for port {i * i % 97}." for i in range(25)
)
QUESTION = "Which ship sailed in 1111?"


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_layer(seqlens: tuple[int, ...] = (200, 120, 0), head_dim: int = 8) -> RaggedLayer:
    offsets = torch.tensor([0, *seqlens]).cumsum(0).int()
    keys, values = torch.randn(2, int(offsets[-1]), head_dim, generator=rng(1))
    return RaggedLayer(keys, values, offsets)


def rows_slowly(layer: RaggedLayer, query: Tensor, head: int) -> list[int]:
    """The rows that the queries [G, D] of a head see, one cluster after another, straight from the paper."""
    index = layer.clusters
    assert index is not None
    first, last = index.cu_clusters[head : head + 2].tolist()
    sizes = index.sizes[first:last].tolist()
    start = layer.offsets[head + 1] - sum(sizes)
    rows = list(range(layer.offsets[head], start))
    mean = index.centroids[first:last].mean(dim=0)
    wanted = [max(float(q @ (index.centroids[c] - mean)) for q in query) for c in range(first, last)]
    left = index.budget
    for c in sorted(range(len(sizes)), key=lambda c: -wanted[c]):
        begin = start + sum(sizes[:c])
        rows += range(begin, begin + min(left, sizes[c]))
        left -= min(left, sizes[c])
    return sorted(rows)


def test_clusters_are_a_partition_with_their_means() -> None:
    keys = torch.randn(300, 6, generator=rng(3))
    order, sizes, centroids = cluster_keys(keys, 12, iterations=20, generator=rng())
    assert sorted(order.tolist()) == list(range(300))
    assert int(sizes.sum()) == 300 and int(sizes.min()) >= 1 and len(sizes) == len(centroids) <= 12
    for members, centroid in zip(order.split(sizes.tolist()), centroids, strict=True):
        assert members.tolist() == sorted(members.tolist())
        torch.testing.assert_close(keys[members].mean(dim=0), centroid)
    again = cluster_keys(keys, 12, iterations=20, generator=rng())
    assert torch.equal(order, again[0]) and not torch.equal(
        order, cluster_keys(keys, 12, iterations=20, generator=rng(5))[0]
    )


def test_clusters_find_what_points_the_same_way() -> None:
    directions = torch.eye(4)[torch.arange(80) % 4]
    keys = directions * torch.rand(80, 1, generator=rng()).add(0.5)  # the same directions, other lengths
    order, sizes, _ = cluster_keys(keys, 4, iterations=20, generator=rng(2))
    groups = {frozenset((members % 4).tolist()) for members in order.split(sizes.tolist())}
    assert all(len(group) == 1 for group in groups)


def test_assignment_ignores_the_length_of_a_key_and_centroids_do_not() -> None:
    keys, centroids = torch.randn(50, 6, generator=rng(1)), torch.randn(7, 6, generator=rng(2))
    scaled = keys * torch.rand(50, 1, generator=rng(3)).add(0.1)
    assert torch.equal(nearest(keys, centroids), nearest(scaled, centroids))
    cosines = torch.nn.functional.cosine_similarity(keys.unsqueeze(1), centroids, dim=-1)
    assert torch.equal(nearest(keys, centroids), cosines.argmax(dim=1))
    plain, other = (cluster_keys(k, 1, iterations=1, generator=rng())[2] for k in (keys, scaled))
    assert not torch.allclose(plain, other)


def test_an_empty_cluster_begins_anew() -> None:
    keys = torch.cat([torch.ones(10, 2), torch.tensor([[1.0, -1.0]])])  # ten of eleven keys are the same
    order, sizes, _ = cluster_keys(keys, 4, iterations=20, generator=rng())
    assert sorted(sizes.tolist()) == [1, 10] and sorted(order.tolist()) == list(range(11))


def test_clusters_are_taken_best_first_and_the_last_is_cut() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    sizes = torch.tensor([[5, 2, 4, 3]])
    taken = [take_clusters(scores, sizes, torch.tensor([[b]])).tolist()[0] for b in (0, 1, 3, 8, 99)]
    assert taken == [[0, 0, 0, 0], [0, 1, 0, 0], [0, 2, 1, 0], [0, 2, 4, 2], [5, 2, 4, 3]]
    assert rows_of_runs(torch.tensor([7, 0, 3]), torch.tensor([2, 0, 3])).tolist() == [7, 8, 3, 4, 5]


def test_clusters_of_one_pair_give_the_exact_best() -> None:
    layer = random_layer((200,))
    one = ClusterFetch(budget=25, tokens_per_cluster=1, num_sinks=0, skip_first=0).apply(layer, 0)
    query = torch.randn(1, 1, 8, generator=rng(4))
    (seen,) = Resident(one).fetch(query)
    best = layer.keys[(layer.keys @ query[0, 0]).topk(25).indices]
    assert sorted(seen.keys.tolist()) == sorted(best.tolist())


@pytest.mark.parametrize("cache_steps", [0, 1, 3])
@pytest.mark.parametrize("num_queries", [1, 40])
def test_what_is_fetched_equals_the_slow_walk(cache_steps: int, num_queries: int) -> None:
    fetch = ClusterFetch(budget=50, tokens_per_cluster=10, num_sinks=4, skip_first=0, cache_steps=cache_steps)
    layer = fetch.apply(random_layer(), 0)
    resident, steps = Resident(layer), torch.randn(4, num_queries, 6, 8, generator=rng(2))
    before: list[set[int]] = []
    total = FetchStats()
    for query in steps:
        seen = list(resident.fetch(query))
        assert len(seen) == num_queries
        for q, found in zip(query, seen, strict=True):
            rows = [rows_slowly(layer, q[2 * head : 2 * head + 2], head) for head in range(3)]
            assert [len(r) for r in rows] == [54, 54, 0] == found.seqlens
            seen_rows = [row for head_rows in rows for row in head_rows]
            assert torch.equal(found.keys, layer.keys[seen_rows])
            assert torch.equal(found.values, layer.values[seen_rows])
        if num_queries == 1:
            needed = {row for head in range(3) for row in rows_slowly(layer, query[0, 2 * head : 2 * head + 2], head)}
            held = set().union(*before[-cache_steps:]) if cache_steps else set()
            hits = len(needed & held)
            step = resident.stats - total
            assert (step.num_pairs, step.num_hits, step.nbytes) == (len(needed), hits, (len(needed) - hits) * 64)
            before, total = [*before, needed], resident.stats
    assert resident.stats.num_steps == 4
    assert (resident.nbytes == 0) == (cache_steps == 0)


def test_a_head_whose_logits_are_all_large_does_not_decide_alone() -> None:
    centroids = torch.tensor([[[1.0, 0.0, 9.0], [0.0, 1.0, 9.0], [0.0, 0.0, 9.0]]])
    centred = centroids - centroids.mean(dim=1, keepdim=True)
    query = torch.tensor([[[0.1, 0.0, 5.0], [0.0, 2.0, 0.0]]])  # the first head cares little, with large products
    assert cluster_scores(query, centroids)[0, 0].argmax() == 0
    assert cluster_scores(query, centred)[0, 0].argmax() == 1


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_budget_without_bounds_is_attention_to_all(has_bias: bool) -> None:
    context, _ = random_context(Shape(context_len=60, has_bias=has_bias))
    cut = ClusterFetch(budget=999, tokens_per_cluster=5, num_sinks=2, skip_first=0).apply(context.layers[0], 0)
    backend, query = get_backend(), torch.randn(1, 4, 1, 4, generator=rng(1))
    (seen,) = Resident(cut).fetch(query[:, :, 0])
    expected = backend.attend_ragged(query, context.layers[0], scale=0.5)
    for found, wanted in zip(backend.attend_ragged(query, seen, scale=0.5), expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.fixture(scope="module", params=["llama", "gemma3", "gemma2"])
def llm(request: pytest.FixtureRequest) -> kvzip.LLM:
    return kvzip.wrap(tiny_model(request.param), tiny_tokenizer())


@torch.inference_mode()
def logits(llm: kvzip.LLM, context: kvzip.CompressedContext, split: int = 0) -> Tensor:
    cache, ids = context.cache(), torch.tensor([llm.question_ids(QUESTION)])
    parts = [ids[:, :split], ids[:, split:]] if split else [ids]
    return torch.cat([llm.model(input_ids=part, past_key_values=cache).logits[0] for part in parts])


def test_a_budget_without_bounds_gives_the_full_cache(llm: kvzip.LLM) -> None:
    full = logits(llm, llm.compress(TEXT, 1.0))
    for split in (0, 1, -1):
        found = logits(llm, llm.compress(TEXT, method="clusterkv:budget=9999,skip_first=0"), split)
        torch.testing.assert_close(found, full, **NOISE)
    small = llm.compress(TEXT, method="clusterkv:budget=40,skip_first=0,tokens_per_cluster=8")
    assert (logits(llm, small) - full).abs().max() > 0.1  # the budget matters, so the comparison can fail
    torch.testing.assert_close(logits(llm, small, 1), logits(llm, small), **NOISE)


def test_batches_rewinds_and_files_answer_as_one_question_does(llm: kvzip.LLM, tmp_path: Path) -> None:
    context = llm.compress(TEXT, method="clusterkv:budget=60,skip_first=0,tokens_per_cluster=8")
    questions = [QUESTION, "Where?", "Who sailed for port 9, and in which year?"]
    alone = [context.ask(q, max_new_tokens=8) for q in questions]
    assert [str(a) for a in context.ask_many(questions, max_new_tokens=8)] == [str(a) for a in alone]
    session = context.session()
    session.ask(questions[1], max_new_tokens=8)
    session.rewind()
    first = session.ask(QUESTION, max_new_tokens=8)
    assert first.token_ids == alone[0].token_ids
    session.save(tmp_path / "chat.kvz")
    reopened = llm.open_session(tmp_path / "chat.kvz")
    assert reopened.ask("And then?", max_new_tokens=8).token_ids == session.ask("And then?", max_new_tokens=8).token_ids
    opened = llm.open(tmp_path / "chat.kvz")
    assert torch.equal(logits(llm, opened), logits(llm, context))


def test_what_was_fetched_is_told(llm: kvzip.LLM) -> None:
    context = llm.compress(TEXT, method="kvzip+clusters:budget=60,skip_first=0,tokens_per_cluster=8", keep_ratio=0.5)
    assert context.data.info.method.endswith("clusters:budget=60,tokens_per_cluster=8,skip_first=0")
    assert context.stats["resident_kv_nbytes"] == context.data.resident_kv_nbytes < context.data.kv_nbytes
    answer = context.ask(QUESTION, max_new_tokens=8)
    assert answer.fetched is not None and answer.fetched.num_steps == answer.num_new_tokens
    assert 0 < answer.fetched.num_hits < answer.fetched.num_pairs and answer.fetched.nbytes > 0
    per_step = answer.fetched.nbytes / answer.fetched.num_steps
    assert answer_json(QUESTION, answer)["fetched_nbytes_per_step"] == per_step
    told = inspect_json(context.data)
    assert told["resident_kv_nbytes"] == context.data.resident_kv_nbytes and told["index_nbytes"] > 0
    assert dict(facts(context.data))["Resident"].endswith("stays in the file")
    plain = llm.compress(TEXT, 1.0)
    assert plain.ask(QUESTION, max_new_tokens=2).fetched is None
    assert inspect_json(plain.data)["index_nbytes"] == 0 and "Resident" not in dict(facts(plain.data))


def test_first_layers_keep_full_attention() -> None:
    llm = kvzip.wrap(tiny_model("llama"), tiny_tokenizer())
    layers = llm.compress(TEXT, method="clusterkv").data.layers
    assert [layer.clusters is not None for layer in layers] == [False, False, True]


def test_quantized_pairs_are_not_fetched() -> None:
    with pytest.raises(InputError, match="fetched pairs"):
        parse_method("int4+clusters")


def clustered_context(num_pairs: int = 60) -> RaggedContext:
    context, _ = random_context(Shape(context_len=num_pairs, has_ranks=False))
    fetch = ClusterFetch(budget=8, tokens_per_cluster=5, num_sinks=2, skip_first=1)
    layers = [layer if layer.window else fetch.apply(layer, i) for i, layer in enumerate(context.layers)]
    return replace(context, layers=tuple(layers))


def test_clusters_are_stored(tmp_path: Path) -> None:
    context, path = clustered_context(), tmp_path / "a.kvz"
    store.write(path, context)
    read = store.read(path)[0]
    assert [layer.clusters is None for layer in read.layers] == [True, True, False]
    for a, b in zip(context.layers, read.layers, strict=True):
        assert torch.equal(a.keys, b.keys)
    ours, theirs = context.layers[2].clusters, read.layers[2].clusters
    assert ours is not None and theirs is not None and (theirs.budget, theirs.cache_steps) == (8, 1)
    for name in ("centroids", "sizes", "cu_clusters"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert read.layers[2].to("cpu", torch.float32).keys.data_ptr() == read.layers[2].keys.data_ptr()
    assert store.read_info(path).kv_nbytes == context.kv_nbytes


DAMAGE = {
    "a cluster of no pairs": {"sizes": lambda t: torch.cat([t[:1] * 0, t[1:]])},
    "more pairs than the head": {"sizes": lambda t: t + 50},
    "a sum that runs over": {"sizes": lambda t: torch.full_like(t, 2**31 - 1)},
    "heads that fall": {"cu_clusters": lambda t: torch.stack([t[0], t[2], t[1]])},
    "heads that begin late": {"cu_clusters": lambda t: t + 1},
    "centroids of another size": {"centroids": lambda t: t[:, :2].contiguous()},
    "too few centroids": {"centroids": lambda t: t[1:].contiguous()},
    "no budget": {"budget": lambda n: 0},
    "too many steps": {"cache_steps": lambda n: 10**6},
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_clusters_that_do_not_fit_are_refused(kind: str, tmp_path: Path) -> None:
    context = clustered_context()
    clusters = context.layers[2].clusters
    changed = {name: change(getattr(clusters, name)) for name, change in DAMAGE[kind].items()}
    layers = (*context.layers[:2], replace(context.layers[2], clusters=replace(clusters, **changed)))
    with pytest.raises(InputError):
        store.write(tmp_path / "a.kvz", replace(context, layers=layers))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("entry", [[], {"7": {"budget": 1, "cache_steps": 1}}, {"1": {"budget": 1, "cache_steps": 1}}, {"2": {}}, {"2": None}, {"2": {"budget": True, "cache_steps": 1}}])  # fmt: skip
def test_storage_that_is_not_ours_is_refused(entry: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.kvz"
    store.write(path, clustered_context())
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    storage = json.loads(header["__metadata__"]["storage"])
    header["__metadata__"]["storage"] = json.dumps(storage | {"clusters": entry})
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(FormatError):
        store.read(path, verify=False)


def test_a_mapped_context_leaves_no_file(tmp_path: Path) -> None:
    context = clustered_context()
    mapped = store.mapped(context, tmp_path / "new")
    assert torch.equal(mapped.layers[2].keys, context.layers[2].keys)
    assert sys.platform == "win32" or not list((tmp_path / "new").iterdir())


MEMORY = """
import sys, torch
from pathlib import Path
from kvzip import store
from kvzip.backends import get_backend
from kvzip.hf.cache import SessionCache
from kvzip.hf.seam import Call
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
torch.randn(64, 64) @ torch.randn(64, 64)
before = anonymous()
context, _ = store.read(sys.argv[1])
cache = SessionCache(context.to("cpu", torch.float32), get_backend("reference"))
tail = torch.randn(1, 2, 1, 64)
for step in range(20):
    for layer in cache.layers:
        view, _ = layer.update(tail, tail)
        view.attend(torch.randn(1, 4, 1, 64), Call(0.125))
print(context.kv_nbytes, anonymous() - before, cache.fetch_stats.num_steps)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell")
def test_the_memory_of_a_fetched_context_stays_small(tmp_path: Path) -> None:
    """64 MiB of pairs in the file; what a session makes anonymous is the budget's."""
    num_pairs, num_heads = 16_384, 2
    keys, values = torch.randn(2, num_heads * num_pairs, 64, generator=rng())
    layer = RaggedLayer(keys, values, torch.tensor([0, num_pairs, 2 * num_pairs], dtype=torch.int32))
    fetch = ClusterFetch(budget=256, tokens_per_cluster=256, skip_first=0, iterations=2)
    layers = tuple(fetch.apply(layer, i) for i in range(4))
    bits = torch.full((len(layers) * num_heads * num_pairs // 8,), 255, dtype=torch.uint8)
    ids = torch.zeros(num_pairs, dtype=torch.int32)
    context = RaggedContext(layers, ids[:0], ids, bits, None, INFO)
    store.write(tmp_path / "long.kvz", context)
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path / "long.kvz")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    nbytes, grown, steps = map(int, done.stdout.split())
    assert steps == 20 and nbytes > 60 << 20
    assert grown < nbytes // 2, f"{grown} bytes of anonymous memory"


def test_fetching_finds_what_eviction_lost() -> None:
    """One pair in 2,000 answers the query, chosen after the compression: at as many pairs in memory, only a fetch has it."""
    num_pairs, head_dim, budget = 2000, 32, 200
    keys = torch.randn(num_pairs, head_dim, generator=rng(1))
    layer = RaggedLayer(keys, torch.randn(num_pairs, head_dim, generator=rng(2)), torch.tensor([0, num_pairs]).int())
    fetched = ClusterFetch(budget=budget - 16, tokens_per_cluster=20, skip_first=0).apply(layer, 0)
    kept = torch.randperm(num_pairs, generator=rng(3))[:budget].sort().values  # nothing is known of the question
    evicted = RaggedLayer(layer.keys[kept], layer.values[kept], torch.tensor([0, budget]).int())
    backend, errors = get_backend("reference"), {"fetch": 0.0, "evict": 0.0}
    for needle in range(0, num_pairs, 50):
        query = (2 * keys[needle]).reshape(1, 1, 1, -1)
        exact = backend.attend_ragged(query, layer, scale=1.0)[0]
        (seen,) = Resident(fetched).fetch(query[:, :, 0])
        assert len(seen.keys) == budget
        errors["fetch"] += float((backend.attend_ragged(query, seen, scale=1.0)[0] - exact).norm())
        errors["evict"] += float((backend.attend_ragged(query, evicted, scale=1.0)[0] - exact).norm())
    assert errors["fetch"] < 0.25 * errors["evict"], errors


def test_beams_share_a_fetched_context() -> None:
    model = tiny_model("llama")
    llm = kvzip.wrap(model, tiny_tokenizer())
    full, cut = (llm.compress(TEXT, method=m) for m in ("clusterkv:budget=9999", "clusterkv:budget=9999,cache_steps=0"))
    ids = torch.tensor([llm.question_ids(QUESTION)])
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    outs = [model.generate(ids, past_key_values=c.cache(), **options) for c in (full, cut, llm.compress(TEXT, 1.0))]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    assert isinstance(full.cache(), SessionCache)
