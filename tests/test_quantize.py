"""Quantized pairs: the codes, their errors and bytes, and contexts that hold them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stored import in_floats
from tiny import tiny_model, tiny_tokenizer
from torch import Tensor

import kvzip
from kvzip.context import RaggedLayer
from kvzip.errors import BudgetError, InputError, KVZipError
from kvzip.methods import parse_method
from kvzip.ops.quantize import (
    BITS,
    SHRINKS,
    Layout,
    QuantizedPairs,
    allot,
    hadamard_matrix,
    pack_codes,
    pack_stream,
    quantize,
    unpack_codes,
    unpack_stream,
)
from kvzip.progress import silent
from kvzip.transforms import get_transform
from kvzip.transforms.base import Rows
from kvzip.transforms.quantize import Quantize

TEXT = "The quick brown fox jumps over the lazy dog. " * 6
OFFSETS = (0, 70, 70, 75, 200)

layouts = st.builds(
    Layout,
    bits=st.sampled_from(BITS),
    axis=st.sampled_from(["token", "channel"]),
    group_size=st.sampled_from([8, 16]),
)
mixed_layouts = st.builds(
    Layout,
    bits=st.sampled_from(BITS),
    axis=st.just("channel"),
    group_size=st.sampled_from([7, 32]),
    mixed=st.just(True),
)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def read_all(pairs: QuantizedPairs, offsets: tuple[int, ...]) -> Tensor:
    return torch.cat([pairs.read(offsets, head, 0, end - start) for head, (start, end) in enumerate(pairwise(offsets))])


def by_hand(numbers: Tensor, offsets: tuple[int, ...], layout: Layout) -> tuple[Tensor, Tensor]:
    """Group by group in float64: what is read back, and the scale of each number."""
    read, scales = numbers.double().clone(), numbers.double().clone()
    size = layout.group_size
    for start, end in pairwise(offsets):
        if layout.axis == "token":
            groups = [
                (slice(i, i + 1), slice(d, d + size))
                for i in range(start, end)
                for d in range(0, numbers.shape[1], size)
            ]
        else:
            rows = [slice(i, min(i + size, end)) for i in range(start, end, size)]
            groups = [(row, slice(d, d + 1)) for row in rows for d in range(numbers.shape[1])]
        for group in groups:
            part = numbers[group].double()
            zero = part.min().half()
            if zero.double() > part.min():
                zero = torch.tensor(np.nextafter(np.float16(zero.item()), np.float16(-np.inf)))
            largest = 2**layout.bits - 1
            scale = (part.max() - zero.double()) / largest
            half = scale.half()
            if half.double() < scale:
                half = torch.tensor(np.nextafter(np.float16(half.item()), np.float16(np.inf)))
            codes = torch.round((part - zero.double()) / half.double()).clamp(0, largest) if half > 0 else 0
            read[group], scales[group] = zero.double() + half.double() * codes, half.double()
    return read, scales


@settings(max_examples=30, deadline=None)
@given(layouts, st.sampled_from([1e-6, 1.0, 200.0]), st.integers(0, 9))
def test_codes_are_those_of_each_group_by_hand(layout: Layout, spread: float, seed: int) -> None:
    offsets = (0, 9, 9, 12)
    numbers = random(seed, 12, 16) * spread + random(seed + 1, 16)
    found = read_all(quantize(numbers, offsets, layout), offsets)
    read, scales = by_hand(numbers, offsets, layout)
    off = (found.double() - read).abs()
    tie = off > 1e-3 * scales + 1e-6 * read.abs()  # float32 may round the other way where float64 is between two codes
    assert (off[tie] <= scales[tie] * 1.001).all() and tie.float().mean() < 0.1


@settings(max_examples=30, deadline=None)
@given(layouts, st.sampled_from([1e-6, 1.0, 200.0]), st.integers(0, 9))
def test_a_number_is_off_by_half_a_scale_at_most(layout: Layout, spread: float, seed: int) -> None:
    numbers = random(seed, 200, 16) * spread + 100 * random(seed + 1, 16)
    _, scales = by_hand(numbers, OFFSETS, layout)
    off = (read_all(quantize(numbers, OFFSETS, layout), OFFSETS).double() - numbers.double()).abs()
    assert (off <= scales * 0.501 + 1e-5).all()


@pytest.mark.parametrize("bits", BITS)
def test_equal_numbers_are_exact(bits: int) -> None:
    for value in (0.0, -1.5, 3.25, 1000.0):
        numbers = torch.full((5, 8), value)
        assert torch.equal(read_all(quantize(numbers, (0, 5), Layout(bits, "token", 8)), (0, 5)), numbers)


@pytest.mark.parametrize("bits", [b for b in BITS if b > 2])
def test_as_many_values_as_codes_are_exact(bits: int) -> None:
    numbers = (
        (torch.arange(2**bits).float() - 3).repeat(2)[torch.randperm(2 ** (bits + 1))].reshape(-1, 2 ** (bits + 1))
    )
    pairs = quantize(numbers, (0, len(numbers)), Layout(bits, "token", numbers.shape[1]))
    assert torch.equal(read_all(pairs, (0, len(numbers))), numbers)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_codes_are_packed_as_the_page_says(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (7, 16), dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    width = 16 * bits // 8
    assert packed.shape == (7, width) and torch.equal(unpack_codes(packed, bits), codes)
    for row, byte, part in ((3, 1, 0), (6, width - 1, 8 // bits - 1)):
        assert packed[row, byte].item() >> bits * part & (2**bits - 1) == codes[row, byte + part * width]


widths_of_a_head = st.lists(st.integers(0, 8), min_size=8, max_size=40).filter(lambda found: sum(found) % 8 == 0)


@settings(max_examples=60, deadline=None)
@example([0] * 8, 1, 0)
@given(widths_of_a_head, st.integers(0, 5), st.integers(0, 9))
def test_strings_of_bits_are_packed_as_the_page_says(widths: list[int], num_rows: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (num_rows, len(widths)), generator=rng) % 2 ** torch.tensor(widths)
    packed = pack_stream(codes.to(torch.uint8), torch.tensor(widths))
    assert packed.shape == (num_rows, sum(widths) // 8)
    for row, found in zip(codes.tolist(), packed.tolist(), strict=True):
        number, bit = 0, 0
        for code, width in zip(row, widths, strict=True):
            number, bit = number | code << bit, bit + width
        assert number == int.from_bytes(bytes(found), "little")
    assert torch.equal(unpack_stream(packed, torch.tensor(widths)), codes.to(torch.uint8))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1e-9, 0.5, 1.0, 3.0, 4.0, 16.0, 1e6]), min_size=8, max_size=8), st.integers(1, 8))
def test_bits_go_where_most_is_left(importance: list[float], bits: int) -> None:
    """One after another, by hand; a bit makes what is left a fourth."""
    left, widths = list(importance), [0] * 8
    for _ in range(8 * bits):
        best = max(range(8), key=lambda c: (left[c] if widths[c] < 8 else -1, -c))
        left[best], widths[best] = left[best] / 4, widths[best] + 1
    found = allot(torch.tensor([importance, [1.0] * 8]), bits)
    assert found[0].long().sum() == 8 * bits and found.max() <= 8
    remains = [sum(w / 4**b for w, b in zip(importance, some, strict=True)) for some in (found[0].tolist(), widths)]
    assert remains[0] == pytest.approx(remains[1], rel=1e-12), "as little is left; of ties any will do"
    assert found[1].tolist() == [bits] * 8


@settings(max_examples=30, deadline=None)
@given(mixed_layouts, st.integers(0, 9))
def test_mixed_codes_are_the_best_of_some_ranges_by_hand(layout: Layout, seed: int) -> None:
    offsets, importance = (0, 40, 40, 45), random(seed + 2, 3, 16).square()
    numbers = random(seed, 45, 16).exp() * random(seed + 1, 16).exp()
    pairs = quantize(numbers, offsets, layout, importance)
    assert pairs.widths is not None and pairs.widths.long().sum(1).tolist() == [16 * layout.bits] * 3
    found = read_all(pairs, offsets)
    for head, (start, end) in enumerate(pairwise(offsets)):
        for first in range(start, end, layout.group_size):
            for channel in range(16):
                part = numbers[first : min(first + layout.group_size, end), channel].double()
                most, middle = 2 ** int(pairs.widths[head, channel]) - 1, (part.min() + part.max()) / 2
                off = float((found[first : first + len(part), channel].double() - part).square().sum())
                if most == 0:
                    assert off <= float((part - part.mean()).square().sum()) * 1.001 + 1e-5
                    continue
                candidates = []
                for shrink in SHRINKS:
                    half = (part.max() - part.min()) / 2 * shrink
                    zero, scale = (middle - half).half().double(), (2 * half / most).half().double()
                    codes = torch.round((part - zero) / scale.clamp_min(1e-30)).clamp(0, most)
                    candidates.append(float((zero + scale * codes - part).square().sum()))
                assert off <= min(candidates) * 1.02 + 1e-6  # float32, and ties of rounding


def test_channels_that_matter_are_closer_where_codes_are_mixed() -> None:
    numbers, importance = random(0, 200, 64) * torch.logspace(-1, 1, 64), torch.logspace(-1, 1, 64)[None]
    off = {}
    for mixed in (False, True):
        pairs = quantize(numbers, (0, 200), Layout(3, "channel", 128, mixed), importance)
        off[mixed] = float(((pairs.read((0, 200), 0, 0, 200) - numbers).square() * importance).sum())
    assert off[True] < 0.5 * off[False]


def test_rotated_codes_are_of_the_vectors_times_the_matrix() -> None:
    matrix = hadamard_matrix(16)
    assert torch.allclose(matrix @ matrix, torch.eye(16), atol=1e-6) and torch.equal(matrix, matrix.T)
    assert torch.equal(matrix.abs(), torch.full((16, 16), 0.25)) and (matrix[0] > 0).all()
    numbers, plain = random(0, 200, 16), Layout(4, "token", 8)
    rotated = quantize(numbers, OFFSETS, replace(plain, rotated=True))
    expected = quantize(numbers @ matrix, OFFSETS, plain)
    assert torch.equal(rotated.codes, expected.codes) and torch.equal(rotated.scales, expected.scales)
    torch.testing.assert_close(read_all(rotated, OFFSETS), read_all(expected, OFFSETS) @ matrix)
    longer = random(3, 200, 48)
    parts = torch.cat([part @ matrix for part in longer.split(16, dim=1)], dim=1)
    in_parts = quantize(longer, OFFSETS, replace(plain, rotated=True))
    torch.testing.assert_close(
        read_all(in_parts, OFFSETS),
        read_all(quantize(parts, OFFSETS, plain), OFFSETS).view(-1, 3, 16).matmul(matrix).view(200, 48),
        atol=0.02,
        rtol=0.02,
    )


def test_vectors_with_single_large_numbers_are_closer_where_codes_are_rotated() -> None:
    numbers = random(0, 200, 64) * (random(1, 200, 64) > 2).float() * 5 + random(2, 200, 64)
    off = {}
    for rotated in (False, True):
        pairs = quantize(numbers, (0, 200), Layout(3, "token", 64, rotated=rotated))
        off[rotated] = float((pairs.read((0, 200), 0, 0, 200) - numbers).square().sum())
    assert off[True] < 0.6 * off[False]


def test_a_head_whose_numbers_are_all_the_same_is_exact() -> None:
    numbers = torch.full((9, 16), 2.5)
    pairs = quantize(numbers, (0, 9), Layout(3, "channel", 4, mixed=True))
    assert torch.equal(read_all(pairs, (0, 9)), numbers)


def test_a_part_of_a_head_reads_as_in_the_whole() -> None:
    numbers = random(3, 200, 16)
    streams = Layout(3, "channel", 32, mixed=True), Layout(3, "channel", 32), Layout(5, "token", 8)
    for layout in (Layout(4, "channel", 32), Layout(8, "token", 4), *streams):
        pairs = quantize(numbers, OFFSETS, layout)
        assert torch.equal(pairs.read(OFFSETS, 3, 40, 101), read_all(pairs, OFFSETS)[75 + 40 : 75 + 101])


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", ["int4", "k8v4", "int2"])
def test_bytes(name: str, head_dim: int) -> None:
    """Four bits take at most 0.30 of float16, scales and zeros counted."""
    options = dict(parse_method(name).transforms[0].options)
    transform, seqlen = Quantize(**options), 640
    layer = RaggedLayer(
        random(0, seqlen, head_dim), random(1, seqlen, head_dim), torch.tensor([0, seqlen], dtype=torch.int32)
    )
    stored = transform.apply(layer)
    nbytes = stored.keys.nbytes + stored.values.nbytes
    limit = {"int4": 0.30, "k8v4": 0.42, "int2": 0.16}[name]
    assert nbytes <= limit * 2 * seqlen * head_dim * 2
    assert nbytes == seqlen * transform.pair_nbytes(head_dim, 4)
    assert stored.nbytes == nbytes + 8


def test_what_can_not_be_stored() -> None:
    with pytest.raises(InputError, match="head size of 3: take 8 bits"):
        quantize(random(0, 4, 3), (0, 4), Layout(4, "token", 3))
    with pytest.raises(InputError, match="group_size 5 does not divide the head size 16"):
        quantize(random(0, 4, 16), (0, 4), Layout(4, "token", 5))
    for layout in (Layout(4, "token", 16), Layout(4, "channel", 16, mixed=True)):
        with pytest.raises(InputError, match="beyond the range of float16"):
            quantize(random(0, 4, 16) * 1e6, (0, 4), layout)
    with pytest.raises(InputError, match="a head size of 12 does not go with mixed codes or 6 bits: take 8 bits"):
        quantize(random(0, 4, 12), (0, 4), Layout(6, "token", 12))
    with pytest.raises(InputError, match="group_size 4 does not go with 3 bits: give a multiple of 8"):
        quantize(random(0, 4, 16), (0, 4), Layout(3, "token", 4))
    with pytest.raises(InputError, match="share a scale: take the axis 'channel'"):
        quantize(random(0, 4, 16), (0, 4), Layout(4, "token", 8, mixed=True))


# ---- contexts


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def case(request: pytest.FixtureRequest) -> SimpleNamespace:
    llm = kvzip.wrap(tiny_model(request.param), tiny_tokenizer())
    return SimpleNamespace(llm=llm, prefilled=llm.prefill(TEXT))


def made(case: SimpleNamespace, method: str, keep_ratio: float | None = None) -> kvzip.CompressedContext:
    return case.prefilled.compress(kvzip.CompressOptions(keep_ratio=keep_ratio, method=method))


def logits(context: kvzip.CompressedContext) -> Tensor:
    ids = torch.tensor([context.llm.question_ids("Who jumps?")])
    with torch.inference_mode():
        return context.llm.model(ids, past_key_values=context.cache()).logits


MIXED = "quantize:key_bits=3,value_bits=4,value_axis=channel,group_size=32,channels=mixed"


@pytest.mark.parametrize(
    "method",
    ["int8", "int4", "k8v4", "quantize:key_bits=16,value_bits=2", "kvzip+int4", "int4:value_bits=3,group_size=8,values=rotated", MIXED,
     f"kvzip+{MIXED}", f"kvzip+refit+{MIXED}"],
)  # fmt: skip
def test_a_quantized_context_is_the_one_of_what_its_codes_read_as(case: SimpleNamespace, method: str) -> None:
    context = made(case, method, 0.5 if method.startswith("kvzip") else None)
    layers = tuple(map(in_floats, context.data.layers))
    floats = kvzip.CompressedContext(case.llm, replace(context.data, layers=layers))
    torch.testing.assert_close(logits(context), logits(floats), atol=1e-4, rtol=1e-4)
    assert context.ask("Who jumps?", max_new_tokens=8).token_ids == floats.ask("Who jumps?", max_new_tokens=8).token_ids
    assert context.data.kv_nbytes < floats.data.kv_nbytes


def test_more_bits_are_closer_and_eviction_comes_first(case: SimpleNamespace) -> None:
    full = logits(case.prefilled.compress(1.0))
    off = [(logits(made(case, name)) - full).abs().mean() for name in ("int8", "int4", "int2")]
    assert off[0] < off[1] < off[2]
    plain, small = made(case, "kvzip", 0.4), made(case, "kvzip+int4", 0.4)
    assert torch.equal(plain.data.keep_mask, small.data.keep_mask)
    for before, after in zip(plain.data.layers, small.data.layers, strict=True):
        if before.window is None:
            assert isinstance(after.keys, QuantizedPairs) and before.seqlens == after.seqlens
        else:
            assert torch.equal(before.keys, after.keys)


def test_saved_and_opened_it_goes_on_the_same(case: SimpleNamespace, tmp_path: Path) -> None:
    context = made(case, "kvzip+int4", 0.5)
    session = context.session()
    session.ask("Who jumps?", max_new_tokens=4)
    session.save(tmp_path / "doc.kvz")
    opened = case.llm.open_session(tmp_path / "doc.kvz")
    assert opened.context.data.kv_nbytes == context.data.kv_nbytes
    assert opened.context.data.info.method == "reconstruction+global+quantize"
    again = [s.ask("Over whom?", max_new_tokens=6).token_ids for s in (session, opened)]
    assert again[0] == again[1]


def test_a_budget_in_bytes_counts_scales(case: SimpleNamespace) -> None:
    for method in ("kvzip+int4", "kvzip+int8:group_size=16", f"kvzip+{MIXED}", "kvzip"):
        least = made(case, method, 1e-9).data.kv_nbytes
        budget = least + 6000
        options = kvzip.CompressOptions(budget=f"{budget}B", method=method)
        nbytes = case.prefilled.compress(options).data.kv_nbytes
        assert budget - 3000 < nbytes <= budget


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "int4", "keep_ratio": 0.5}, r"keep_ratio 0\.5 .*'int4', which evicts nothing.*'kvzip\+int4'"),
        ({"method": "int4", "budget": 100}, r"budget 100 .*evicts nothing"),
    ],
)
def test_nothing_is_evicted_without_a_scorer(options: dict, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        kvzip.CompressOptions(**options)
    assert kvzip.CompressOptions(method="int4").keep_ratio == 1


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("quantize:key_bits=7", "one of 16, 8, 6, 5, 4, 3, 2"),
        ("quantize:key_bits=four", "one of 16, 8, 6, 5, 4, 3, 2"),
        ("quantize:channels=even", "one of equal, mixed"),
        ("int4:value_axis=row", "one of token, channel"),
        ("int4:group_size=0", "at least 1, at most 1024"),
        ("pyramid+int4", "has no scorer"),
        ("quantise", "did you mean 'quantize'"),
    ],
)
def test_bad_options(method: str, message: str) -> None:
    with pytest.raises(KVZipError, match=message):
        kvzip.CompressOptions(method=method)


def test_without_a_scorer_nothing_is_replayed(case: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvzip.compress.replay", lambda *args: pytest.fail("replayed"))
    assert made(case, "int4").data.keep_mask.all()


def test_keys_of_the_prefix_have_more_bits(case: SimpleNamespace) -> None:
    whole, plain = made(case, "int4:group_size=8"), made(case, "int4:group_size=8,prefix_key_bits=4")
    prefix_len = whole.data.prefix_len
    for index in whole.data.full_layers:
        layer, alone = whole.data.layers[index], plain.data.layers[index]
        assert prefix_len > 0 and layer.lower is not None and alone.lower is None
        assert [level.keys.layout.bits for level in layer.levels] == [8, 4]
        assert [level.values.layout.bits for level in layer.levels] == [4, 4]
        assert counts_of(layer.offsets) == [prefix_len] * layer.num_kv_heads
        assert layer.seqlens == alone.seqlens
        before, (keys, _), (coarse, _) = case.prefilled.compress(1.0).data.layers[index], layer.dense(), alone.dense()
        for head, start in enumerate(before.offsets[:-1]):
            own = before.keys[start : start + prefix_len]
            found = keys[head * prefix_len : (head + 1) * prefix_len]
            assert (found - own).abs().mean() < 0.2 * (coarse[start : start + prefix_len] - own).abs().mean()
    eight = made(case, "int8")
    assert all(layer.lower is None for layer in eight.data.layers), "no fewer bits than the others have"


def counts_of(offsets: tuple[int, ...]) -> list[int]:
    return [b - a for a, b in pairwise(offsets)]


@pytest.mark.parametrize("method", ["int4:group_size=8", "k8v4", "kvzip+levels:high=0.02,group_size=8", MIXED])
def test_read_back_is_what_will_be_read(case: SimpleNamespace, method: str) -> None:
    """What `refit` is told of later transforms, against the layer that they make, head by head."""
    plain = made(case, "kvzip", 1.0).data
    coded = made(case, method, 1.0 if method.startswith("kvzip") else None).data
    (part,) = parse_method(method).transforms
    transform, prefix_len = get_transform(part), plain.prefix_len
    queries = None if method != MIXED else case.prefilled._replayed(kvzip.CompressOptions(), silent)[0]
    scores = case.prefilled.scores(parse_method("kvzip"))
    for number, index in enumerate(coded.full_layers):
        layer, before = coded.layers[index], plain.layers[index]
        levels = [level.dense() for level in layer.levels]
        importance = None
        if queries is not None:
            importance = case.prefilled._full._evicted(index, None, number, None, queries).key_importance
        for head, (start, end) in enumerate(pairwise(before.offsets)):
            own = torch.cat([torch.full((prefix_len,), torch.inf), scores[number, head]])
            for which, pairs in (("keys", before.keys), ("values", before.values)):
                own_importance = None if importance is None or which == "values" else importance[head]
                found = transform.read_back(Rows(which, pairs[start:end], own, prefix_len, own_importance))
                rows = [
                    read[which == "values"][level.offsets[head] : level.offsets[head + 1]]
                    for level, read in zip(layer.levels, levels, strict=True)
                ]
                expected, is_high = torch.empty_like(pairs[start:end]), own > (0.02 if "levels" in method else 1e9)
                if len(rows) == 1:
                    expected = rows[0]
                else:
                    expected[is_high], expected[~is_high] = rows
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
