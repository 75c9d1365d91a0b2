"""A batch of vLLM's with contexts in it: which token sees what, against masks over all keys. Needs no vLLM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from random_context import Shape, random_context
from torch import Tensor

from kvzip.backends import get_backend, native
from kvzip.context import RaggedLayer
from kvzip.integrations.vllm.attending import LayerRule, Paged, attend_asked
from kvzip.integrations.vllm.paged import BlockLayout, learn_layout
from kvzip.integrations.vllm.plan import make_plan
from kvzip.ops.attention import attend
from kvzip.ops.rope import angles, shift_keys

BLOCK, DIM, HEADS, GROUPS = 4, 8, 2, 3
INV_FREQ = torch.tensor([1.0, 0.3, 0.1, 0.03])


def in_rows(keys: Tensor, values: Tensor, cache: Tensor, slots: Tensor) -> None:
    """A paged cache whose blocks hold keys, then values, token after token."""
    for token, slot in enumerate(slots.tolist()):
        block = cache[slot // BLOCK].view(cache.shape[1], 2, BLOCK, DIM)
        block[:, 0, slot % BLOCK], block[:, 1, slot % BLOCK] = keys[token], values[token]


def in_columns(keys: Tensor, values: Tensor, cache: Tensor, slots: Tensor) -> None:
    for token, slot in enumerate(slots.tolist()):
        block = cache[slot // BLOCK].view(cache.shape[1], 2, DIM * BLOCK)
        block[:, 0].view(-1, DIM, BLOCK)[:, :, slot % BLOCK] = keys[token]
        block[:, 1].view(-1, BLOCK, DIM)[:, slot % BLOCK] = values[token]


def scrambled(keys: Tensor, values: Tensor, cache: Tensor, slots: Tensor) -> None:
    order = torch.randperm(BLOCK * DIM, generator=torch.Generator().manual_seed(5))
    plain = torch.full_like(cache, -1.0)
    in_rows(keys, values, plain, slots)
    for block in set((slots // BLOCK).tolist()):
        own = plain[block].view(cache.shape[1], 2, BLOCK * DIM)[..., order]
        cache[block] = torch.where(own == -1, cache[block].view_as(own), own).view_as(cache[block])


WRITERS = {"rows": in_rows, "columns": in_columns, "scrambled": scrambled}


@pytest.mark.parametrize("name", WRITERS)
def test_a_layout_is_learned_from_its_writer(name: str) -> None:
    layout = learn_layout(WRITERS[name], HEADS, BLOCK, DIM, torch.bfloat16)
    assert name == "scrambled" or layout.keys == name
    cache, rng = torch.zeros(6, HEADS, BLOCK, 2 * DIM), torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2 * BLOCK, HEADS, DIM, generator=rng)
    slots = torch.cat([torch.arange(4 * BLOCK, 5 * BLOCK), torch.arange(2 * BLOCK, 3 * BLOCK)])
    WRITERS[name](keys, values, cache, slots)
    found = layout.read(cache, torch.tensor([[4, 2]]))
    for own, written in zip(found, (keys, values), strict=True):
        assert torch.equal(own[0].transpose(0, 1), written)


def test_a_cache_that_scatters_heads_is_refused() -> None:
    from kvzip.errors import BackendError

    def elsewhere(keys: Tensor, values: Tensor, cache: Tensor, slots: Tensor) -> None:
        in_rows(keys, values, cache, slots - BLOCK)

    with pytest.raises(BackendError, match="does not keep"):
        learn_layout(elsewhere, HEADS, BLOCK, DIM, torch.float32)


@dataclass
class Row:
    """One request of a batch.  context: which one it asks, or None.  done, new: tokens before this step and of it."""

    context: int | None
    done: int
    new: int


def rotated(tensor: Tensor, first: int) -> Tensor:
    """[T, H, D] as at positions first, first + 1, ..."""
    return torch.stack([shift_keys(row, INV_FREQ, first + i) for i, row in enumerate(tensor)])


BATCHES = {
    "decode": [Row(0, 5, 1)],
    "first tokens": [Row(0, 0, 7)],
    "a chunk": [Row(1, 6, 3)],
    "all kinds": [
        Row(0, 5, 1),
        Row(None, 3, 2),
        Row(1, 0, 4),
        Row(0, 9, 1),
        Row(None, 8, 1),
        Row(1, 2, 5),
        Row(1, 30, 1),
    ],
    "one token": [Row(1, 0, 1), Row(0, 12, 1)],
}


@pytest.mark.parametrize("window", [None, 6], ids=["full", "window"])
@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_each_token_sees_its_context_and_what_came_before_it(
    batch: list[Row], writer: Callable[..., None], window: int | None
) -> None:
    shape = Shape(windows=(None, 6), num_kv_heads=HEADS, head_dim=DIM, has_bias=True, keep=0.6)
    contexts = {str(i): random_context(shape, seed=i)[0].layers[0 if window is None else 1] for i in range(2)}
    contexts = {key: layer if window is None else bare(layer) for key, layer in contexts.items()}
    rng = torch.Generator().manual_seed(7)
    cache = torch.full((64, HEADS, BLOCK, 2 * DIM), 3.0)
    table, handles, starts, lengths = torch.zeros(len(batch), 16, dtype=torch.int32), {}, [0], []
    queries, wanted, free = [], {}, 1
    for index, row in enumerate(batch):
        total = row.done + row.new
        count = -(-total // BLOCK) + (row.context is not None)
        table[index, :count] = torch.arange(free, free + count)
        own = table[index, 1:count] if row.context is not None else table[index, :count]
        free += count
        keys, values = torch.randn(2, total, HEADS, DIM, generator=rng)
        plain = torch.randn(row.new, HEADS * GROUPS, DIM, generator=rng)
        if row.context is not None:
            handles[int(table[index, 0])] = str(row.context)
            slots = torch.cat([torch.arange(BLOCK) + int(block) * BLOCK for block in own])[:total]
            writer(rotated(keys, BLOCK), values, cache, slots)
            layer = contexts[str(row.context)]
            wanted[index] = reference(layer, rotated(plain, row.done), rotated(keys, 0), values, row.done, window)
        queries.append(rotated(plain, row.done + BLOCK))
        starts.append(starts[-1] + row.new)
        lengths.append(total + (BLOCK if row.context is not None else 0))
    plan = make_plan(handles, table, starts, lengths, BLOCK)
    assert plan is not None
    layout: BlockLayout = learn_layout(writer, HEADS, BLOCK, DIM, torch.float32)
    cos, sin = (t[0].float() for t in angles(INV_FREQ, torch.tensor([-BLOCK])))
    rule = LayerRule(get_backend("auto"), 0.4, window, cos, sin)
    output = torch.full((starts[-1], HEADS * GROUPS, DIM), 7.0)
    attend_asked(rule, torch.cat(queries), plan, contexts, Paged(cache, layout), output)
    for index, row in enumerate(batch):
        found = output[starts[index] : starts[index + 1]]
        if row.context is None:
            assert bool((found == 7.0).all()) and index in plan.plain
        else:
            torch.testing.assert_close(found, wanted[index], rtol=0, atol=2e-6)


def bare(layer: RaggedLayer) -> RaggedLayer:
    """Sliding layers have no biases."""
    return RaggedLayer(layer.keys, layer.values, layer.cu_seqlens, layer.window)


def reference(layer: RaggedLayer, query: Tensor, keys: Tensor, values: Tensor, done: int, window: int | None) -> Tensor:
    """[T, Hq, D] over all pairs at once, head by head; everything stands where the context has it."""
    heads = []
    for head in range(HEADS):
        before_keys, before_values = layer.read(head)
        every = torch.cat([before_keys, keys[:, head]]), torch.cat([before_values, values[:, head]])
        own = torch.arange(done, done + len(query)).unsqueeze(1)
        num_before = len(before_keys)
        places = torch.cat([torch.arange(-num_before, 0), torch.arange(len(keys))])
        mask = places <= own
        if window is not None:
            mask &= own - places < window
        bias = torch.zeros(len(places))
        if layer.bias is not None:
            bias[:num_before] = layer.bias[layer.offsets[head] : layer.offsets[head + 1]]
        rows = query[:, head * GROUPS : (head + 1) * GROUPS].transpose(0, 1)[None]
        out, _ = attend(
            rows, every[0][None, None], every[1][None, None], scale=0.4, mask=mask[None, None],
            bias=bias[None, None, None],
        )  # fmt: skip
        heads.append(out[0])
    return torch.cat(heads).transpose(0, 1)


@pytest.mark.skipif(native._compiler() is None, reason="no C compiler on this machine")
@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("size", [4, 32, 128])
def test_the_kernel_for_paged_tails_is_as_the_reference(size: int, window: int | None) -> None:
    rng, lengths, num_heads = torch.Generator().manual_seed(size), torch.tensor([1, size, size + 3, 3 * size]), 6
    cache = 5 * torch.randn(20, HEADS, size, 2 * DIM, generator=rng)
    blocks = torch.randperm(20, generator=rng)[:12].view(4, 3).contiguous()
    query = torch.randn(4, num_heads, DIM, generator=rng)
    assert native.fits_paged(cache, num_heads) and not native.fits_paged(cache.double(), num_heads)
    out, lse = native.attend_paged(query, cache, blocks, lengths, scale=0.4, window=window)
    keys, values = BlockLayout("columns", "rows").read(cache, blocks)
    places = torch.arange(3 * size)
    mask = places < lengths.unsqueeze(1)
    if window is not None:
        mask &= places >= lengths.unsqueeze(1) - window
    wanted, wanted_lse = attend(query.unsqueeze(2), keys, values, scale=0.4, mask=mask[:, None, None])
    torch.testing.assert_close(out, wanted.squeeze(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(lse, wanted_lse.squeeze(2), rtol=0, atol=1e-5)


def test_a_batch_without_contexts_has_no_plan() -> None:
    table = torch.tensor([[3, 4], [5, 0]], dtype=torch.int32)
    assert make_plan({7: "0"}, table, [0, 1, 2], [6, 2], BLOCK) is None
    assert make_plan({3: "0"}, table, [0, 0, 2], [6, 2], BLOCK) is None  # no new tokens


def test_a_handle_that_would_be_computed_ends_the_engine() -> None:
    with pytest.raises(AssertionError, match="handle block"):
        make_plan({3: "0"}, torch.tensor([[3, 4]]), [0, 5], [6], BLOCK)
