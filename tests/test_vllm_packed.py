"""The index arithmetic of the GPU backend, driven by plain functions in place of vLLM's. Needs no vLLM and no GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from flash import Flash, join
from random_context import Shape, random_context
from test_vllm_plan import BATCHES, BLOCK, DIM, GROUPS, HEADS, INV_FREQ, Row, bare, reference, rotated
from torch import Tensor

from kvzip.backends.reference import ReferenceBackend
from kvzip.context import RaggedLayer
from kvzip.errors import BackendError
from kvzip.integrations.vllm import packed
from kvzip.integrations.vllm.packed import (
    FlashRule,
    PackedLayer,
    PackedPlan,
    attend_heads,
    attend_packed,
    folded,
    make_packed_plan,
    pack_layer,
)
from kvzip.ops.quantize import Layout
from kvzip.ops.rope import angles

SCALE, WINDOW = 0.4, 6
FULL = Shape(windows=(None, WINDOW), num_kv_heads=HEADS, head_dim=DIM, has_bias=True, keep=0.6)
SPARSE = replace(FULL, prefix_len=0, keep=0.1)  # with empty heads
EMPTY = replace(FULL, prefix_len=0, keep=0.0)
NOTHING = RaggedLayer(torch.empty(0, DIM), torch.empty(0, DIM), torch.zeros(HEADS + 1, dtype=torch.int32))
MIXED = BATCHES["all kinds"]


@dataclass
class Batch:
    """What the engine hands over, and what should come out.

    query: [T, Hq, D].  cache: keys and values [N, block_size, Hkv, D].  handles, table, starts, lengths: as in
    `make_packed_plan`.  wanted: [T, Hq, D].
    """

    query: Tensor
    cache: tuple[Tensor, Tensor]
    handles: dict[int, str]
    table: Tensor
    starts: Tensor
    lengths: Tensor
    wanted: Tensor

    def plan(self) -> PackedPlan:
        plan = make_packed_plan(self.handles, self.table, self.starts, self.lengths, BLOCK)
        assert plan is not None
        return plan


def as_vllm_has_it(rows: list[Row], layers: list[RaggedLayer], window: int | None, dtype: torch.dtype) -> Batch:
    """Random tokens behind the contexts `layers`, in blocks; what no token may see is not a number."""
    rng = torch.Generator().manual_seed(7)
    both = torch.full((64, HEADS, BLOCK, 2 * DIM), torch.nan, dtype=dtype)
    cache = both.transpose(1, 2).split(DIM, dim=-1)
    table, handles, starts, lengths, queries, wanted = (
        torch.zeros(len(rows), 16, dtype=torch.int32),
        {},
        [0],
        [],
        [],
        [],
    )
    free = 1
    for index, row in enumerate(rows):
        shift = 0 if row.context is None else BLOCK
        total = row.done + row.new
        count = -(-(total + shift) // BLOCK)
        own = torch.arange(free, free + count, dtype=torch.int32)
        table[index, :count], free = own, free + count
        keys, values = torch.randn(2, total, HEADS, DIM, generator=rng)
        plain = torch.randn(row.new, HEADS * GROUPS, DIM, generator=rng)
        if row.context is not None:
            handles[int(own[0])] = str(row.context)
        for token in range(total):
            block, place = own[(token + shift) // BLOCK], (token + shift) % BLOCK
            cache[0][block, place], cache[1][block, place] = rotated(keys, shift)[token], values[token]
        queries.append(rotated(plain, row.done + shift))
        starts.append(starts[-1] + row.new)
        lengths.append(total + shift)
        layer = NOTHING if row.context is None else layers[row.context]
        wanted.append(reference(layer, rotated(plain, row.done), rotated(keys, 0), values, row.done, window))
    numbers = (torch.tensor(t, dtype=torch.int32) for t in (starts, lengths))
    return Batch(torch.cat(queries).to(dtype), cache, handles, table, *numbers, torch.cat(wanted))


def rule_of(window: int | None, flash: Callable[..., tuple[Tensor, Tensor]]) -> FlashRule:
    cos, sin = (t[0].float() for t in angles(INV_FREQ, torch.tensor([-BLOCK])))
    return FlashRule(ReferenceBackend(), SCALE, window, cos, sin, flash, join)


def layers_of(shape: Shape, window: int | None) -> list[RaggedLayer]:
    layers = [random_context(shape, seed=seed)[0].layers[0 if window is None else 1] for seed in range(2)]
    return layers if window is None else [bare(layer) for layer in layers]


def found_in(
    rows: list[Row],
    layers: list[RaggedLayer],
    window: int | None = None,
    flash: Flash | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """What comes out and what should."""
    batch = as_vllm_has_it(rows, layers, window, dtype)
    contexts = {str(i): pack_layer(layer.to("cpu", dtype), SCALE) for i, layer in enumerate(layers)}
    output = torch.full_like(batch.query, torch.nan)
    most = max(row.new for row in rows), int(batch.lengths.max())
    attend_packed(rule_of(window, flash or Flash()), batch.query, batch.plan(), contexts, batch.cache, output, most)
    return output.float(), batch.wanted


@pytest.mark.parametrize("empty_lse", [torch.inf, -torch.inf], ids=["+inf", "-inf"])
@pytest.mark.parametrize("shape", [FULL, SPARSE, EMPTY], ids=["full", "empty heads", "empty layer"])
@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
def test_each_token_sees_its_context_and_its_tail(rows: list[Row], shape: Shape, empty_lse: float) -> None:
    found, wanted = found_in(rows, layers_of(shape, None), flash=Flash(empty_lse))
    torch.testing.assert_close(found, wanted, rtol=0, atol=3e-6)


def test_the_shapes_have_what_they_are_for() -> None:
    lengths = [length for layer in layers_of(SPARSE, None) for length in layer.seqlens]
    assert 0 in lengths and max(lengths) > 0
    assert not any(length for layer in layers_of(EMPTY, None) for length in layer.seqlens)


@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
def test_in_a_sliding_layer_only_what_is_in_the_window(rows: list[Row]) -> None:
    found, wanted = found_in(rows, layers_of(FULL, WINDOW), WINDOW)
    torch.testing.assert_close(found, wanted, rtol=0, atol=3e-6)


@pytest.mark.parametrize("window", [None, WINDOW], ids=["full", "window"])
def test_in_bfloat16_as_far_as_it_goes(window: int | None) -> None:
    found, wanted = found_in(MIXED, layers_of(FULL, window), window, dtype=torch.bfloat16)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.04)


@pytest.mark.parametrize("what", ["without_handles", "folded", "turned_back"])
def test_nothing_of_it_can_be_left_out(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    instead = {
        "without_handles": lambda table, behind: table,
        "folded": lambda bias, scale, dtype: torch.zeros(len(bias), packed.FOLDED, dtype=dtype),
        "turned_back": lambda rule, rows: rows,
    }
    monkeypatch.setattr(packed, what, instead[what])
    found, wanted = found_in(MIXED, layers_of(FULL, None))
    assert not torch.allclose(found, wanted, rtol=0, atol=1e-2)


def test_one_call_for_all_tails_and_one_for_each_context() -> None:
    flash = Flash()
    found_in(MIXED, layers_of(FULL, None), flash=flash)
    assert flash.calls == [len(MIXED), HEADS, HEADS]
    flash = Flash()
    found_in(MIXED, layers_of(FULL, WINDOW), WINDOW, flash)
    assert flash.calls == [len(MIXED)]


@pytest.mark.parametrize("window", [None, WINDOW], ids=["full", "window"])
def test_no_layer_waits_for_what_the_device_found(window: int | None) -> None:
    """On a device without numbers, where reading one is an error."""

    def flash(*, q: Tensor, out: Tensor | None = None, **others: object) -> tuple[Tensor, Tensor]:
        assert all(value.is_meta for value in others.values() if isinstance(value, Tensor))
        return torch.empty_like(q) if out is None else out, q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)

    layers = layers_of(SPARSE, window)
    batch = as_vllm_has_it(MIXED, layers, window, torch.float32)
    plan = batch.plan()
    there = PackedPlan(
        {key: packed._on(torch.device("meta"), asked) for key, asked in plan.asked.items()},
        *(t.to("meta") for t in (plan.block_table, plan.lengths, plan.query_start_loc)),
    )
    contexts = {str(i): on_meta(pack_layer(layer, SCALE)) for i, layer in enumerate(layers)}
    rule = rule_of(window, flash)
    rule = replace(rule, cos=rule.cos.to("meta"), sin=rule.sin.to("meta"), join=lambda *parts: None)
    query = batch.query.to("meta")
    cache = batch.cache[0].to("meta"), batch.cache[1].to("meta")
    attend_packed(rule, query, there, contexts, cache, torch.empty_like(query), (5, 64))


def on_meta(layer: PackedLayer) -> PackedLayer:
    tensors = {name: getattr(layer, name) for name in ("keys", "values", "cu_seqlens", "empty")}
    return replace(layer, **{name: None if t is None else t.to("meta") for name, t in tensors.items()})


def test_a_batch_without_contexts_has_no_plan() -> None:
    table = torch.tensor([[3, 4], [5, 0]], dtype=torch.int32)
    starts, lengths = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([6, 2], dtype=torch.int32)
    assert make_packed_plan({7: "0"}, table, starts, lengths, BLOCK) is None
    no_new = torch.tensor([0, 0, 2], dtype=torch.int32)  # a row of padding, whose blocks are an earlier step's
    assert make_packed_plan({3: "0"}, table, no_new, lengths, BLOCK) is None


def test_a_handle_that_would_be_computed_ends_the_engine() -> None:
    table, starts, lengths = (torch.tensor(t, dtype=torch.int32) for t in ([[3, 4]], [0, 5], [6]))
    with pytest.raises(AssertionError, match="handle block"):
        make_packed_plan({3: "0"}, table, starts, lengths, BLOCK)


@pytest.mark.parametrize("biased", [(), (0,), (0, 1)], ids=["no biases", "biases of one level", "biases"])
@pytest.mark.parametrize(
    "first", [Layout(8, "token", 4), Layout(3, "channel", 4, mixed=True), None], ids=["codes", "mixed", "numbers"]
)
def test_levels_and_codes_become_one_segment_a_head(first: Layout | None, biased: tuple[int, ...]) -> None:
    levels = ((first, first), (Layout(4, "channel", 4), Layout(4, "token", 4)))
    upper = random_context(replace(FULL, windows=(None,), levels=levels), seed=3)[0].layers[0]
    assert upper.lower is not None
    both = [level if index in biased else replace(level, bias=None) for index, level in enumerate(upper.levels)]
    layer = replace(both[0], lower=both[1])
    held = pack_layer(layer, SCALE)
    width = DIM + packed.FOLDED if biased else DIM
    assert held.cu_seqlens.diff().tolist() == layer.seqlens and held.keys.shape[1] == width
    query = torch.randn(5, HEADS * GROUPS, DIM, generator=torch.Generator().manual_seed(1))
    out, lse = attend_heads(rule_of(None, Flash()), query, held)
    wanted, wanted_lse = ReferenceBackend().attend_ragged(query.transpose(0, 1)[None], layer, scale=SCALE)
    torch.testing.assert_close(out.transpose(0, 1)[None], wanted, rtol=0, atol=3e-6)
    torch.testing.assert_close(lse[None], wanted_lse, rtol=0, atol=3e-6)


def test_pairs_of_one_level_are_not_copied() -> None:
    layer = random_context(replace(FULL, has_bias=False), seed=3)[0].layers[0]
    held = pack_layer(layer, SCALE)
    assert held.keys is layer.keys and held.values is layer.values


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_folded_bias_is_exact_to_24_bits(dtype: torch.dtype) -> None:
    bias = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 3
    parts = folded(bias, SCALE, dtype)
    assert parts.shape == (1000, packed.FOLDED) and parts.dtype == dtype
    wanted = bias.double() / SCALE
    error = (parts.double().sum(dim=1) - wanted).abs()
    assert bool((error <= wanted.abs() * 2.0**-23 + 2.0**-24).all())


def test_a_bias_beyond_the_dtype_is_refused() -> None:
    with pytest.raises(BackendError, match="float16"):
        folded(torch.tensor([1e5]), SCALE, torch.float16)
    assert bool(folded(torch.tensor([1e5]), SCALE, torch.bfloat16).isfinite().all())
