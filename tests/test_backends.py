"""Every backend equals the reference on dense, masked and ragged input."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvzip.backends import BACKENDS, get_backend, native, varlen
from kvzip.context import RaggedLayer
from kvzip.errors import BackendError, UnknownNameError
from kvzip.ops import attention
from kvzip.ops.quantize import Layout, quantize

needs_compiler = pytest.mark.skipif(native._compiler() is None, reason="no C compiler on this machine")
NAMES = [pytest.param(name, marks=needs_compiler if name == "native" else ()) for name in sorted(BACKENDS)]
LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=3)


def ragged_layer(lengths: list[int], seed: int, with_bias: bool, head_dim: int = 16) -> RaggedLayer:
    gen = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    keys, values = torch.randn(2, total, head_dim, generator=gen)
    return RaggedLayer(keys, values, offsets, None, torch.randn(total, generator=gen) if with_bias else None)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(1, 2), st.integers(1, 3), st.integers(1, 5), st.booleans(), st.booleans())
def test_ragged_equals_one_dense_call_a_head(
    name: str, lengths: list[int], batch: int, groups: int, q_len: int, with_bias: bool, capped: bool
) -> None:
    layer = ragged_layer(lengths, 3, with_bias)
    check_ragged(name, layer, batch, groups, q_len, 3.0 if capped else None)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("groups", [3, 7])
@pytest.mark.parametrize("with_bias", [False, True])
def test_long_segments_are_split_and_joined(name: str, head_dim: int, groups: int, with_bias: bool) -> None:
    layer = ragged_layer([1, 3001, 0, 513, 1024], 5, with_bias, head_dim)
    check_ragged(name, layer, 1, groups, 1, None)
    check_ragged(name, layer, 2, groups, 3, None)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tail_len", [1, 300])
def test_decoding_is_attention_to_context_and_tail(name: str, tail_len: int) -> None:
    layer, gen = ragged_layer([700, 0, 5], 8, False, 64), torch.Generator().manual_seed(9)
    query = torch.randn(1, 6, 1, 64, generator=gen)
    keys, values = (torch.randn(1, 3, 400, 64, generator=gen)[:, :, :tail_len] for _ in range(2))
    out = get_backend(name).decode(query, layer, keys, values, scale=0.2)
    for head, (start, end) in enumerate(zip(layer.offsets, layer.offsets[1:], strict=False)):
        whole = [
            torch.cat([kept[start:end], tail[0, head]])[None, None]
            for kept, tail in ((layer.keys, keys), (layer.values, values))
        ]
        rows = slice(2 * head, 2 * head + 2)
        expected, _ = attention.attend(query[:, rows], *whole, scale=0.2)
        torch.testing.assert_close(out[:, rows], expected, atol=1e-5, rtol=1e-5)


Layouts = list[tuple[Layout | None, Layout | None]]

LAYOUTS: Layouts = [
    (Layout(8, "token", 16), Layout(4, "token", 16)),
    (Layout(4, "channel", 32), Layout(2, "token", 8)),
    (Layout(2, "channel", 7), Layout(8, "channel", 64)),
    (Layout(4, "channel", 64), None),
    (Layout(3, "channel", 50, mixed=True), Layout(3, "token", 16)),
    (Layout(5, "channel", 128), Layout(4, "channel", 40, mixed=True)),
]


ROTATED: Layouts = [(Layout(4, "channel", 32), Layout(4, "token", 16, rotated=True)), (None, Layout(3, "token", 8, rotated=True)),
           (Layout(3, "channel", 9, mixed=True), Layout(4, "channel", 16, mixed=True, rotated=True))]  # fmt: skip


def in_levels(
    lengths: list[int], head_dim: int = 16, with_bias: bool = False, layouts: Layouts = LAYOUTS
) -> tuple[RaggedLayer, RaggedLayer]:
    """A layer whose pairs stand in several precisions, and the same pairs as floats, one level."""
    whole = [ragged_layer(lengths, seed, with_bias, head_dim) for seed in range(len(layouts))]
    stored = None
    for layer, (keys, values) in zip(reversed(whole), reversed(layouts), strict=True):
        stored = RaggedLayer(
            *(
                t if layout is None else quantize(t, layer.offsets, layout)
                for t, layout in ((layer.keys, keys), (layer.values, values))
            ),
            layer.cu_seqlens,
            None,
            layer.bias,
            stored,
        )
    assert stored is not None
    read = [level.dense() for level in stored.levels]
    heads = [slice(a, b) for a, b in pairwise(whole[0].offsets)]
    keys, values = (torch.cat([level[i][head] for head in heads for level in read]) for i in (0, 1))
    biases = [torch.cat([layer.bias[head] for head in heads for layer in whole])] if with_bias else [None]
    return stored, RaggedLayer(keys, values, whole[0].cu_seqlens * len(layouts), None, biases[0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lengths", [[40, 0, 3], [1300, 65, 700]])
@pytest.mark.parametrize("head_dim", [16, 64, 80])
@pytest.mark.parametrize("rows", [(1, 3, 1), (2, 7, 2), (1, 2, 40)])
def test_pairs_in_several_precisions_equal_the_same_pairs_as_floats(
    name: str, lengths: list[int], head_dim: int, rows: tuple[int, int, int]
) -> None:
    batch, groups, q_len = rows
    cases = [(True, None, LAYOUTS), (False, None, LAYOUTS), (False, 3.0, LAYOUTS)]
    cases += [(True, None, ROTATED), (False, 3.0, ROTATED)]
    for with_bias, softcap, layouts in cases:
        stored, floats = in_levels(lengths, head_dim, with_bias, layouts)
        query = torch.randn(batch, 3 * groups, q_len, head_dim, generator=torch.Generator().manual_seed(4))
        found = get_backend(name).attend_ragged(query, stored, scale=0.2, softcap=softcap)
        expected = get_backend("reference").attend_ragged(query, floats, scale=0.2, softcap=softcap)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)
        if batch == q_len == 1:
            tail = torch.randn(2, 1, 3, 700, head_dim, generator=torch.Generator().manual_seed(5))
            decoded = get_backend(name).decode(query, stored, *tail, scale=0.2, softcap=softcap)
            expected_out = get_backend("reference").decode(query, floats, *tail, scale=0.2, softcap=softcap)
            torch.testing.assert_close(decoded, expected_out, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("q_len", [1, 40])
def test_biases_in_16_bits_are_those_numbers(name: str, q_len: int) -> None:
    """Also the largest and least of them, subnormal ones and both zeros; with and without them the results differ."""
    layer = ragged_layer([900, 0, 37], 11, True, 64)
    half = layer.bias.half()
    half[:6] = torch.tensor([0.0, -0.0, 6e-8, -1e-5, 3.0, -3.0])
    query = torch.randn(1, 6, q_len, 64, generator=torch.Generator().manual_seed(12))
    found, expected, without = (
        get_backend(backend).attend_ragged(query, replace(layer, bias=bias), scale=0.2)
        for backend, bias in ((name, half), ("reference", half.float()), ("reference", None))
    )
    for a, b, c in zip(found, expected, without, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(a, c, atol=1e-2)


@needs_compiler
def test_the_kernel_gives_the_same_with_any_number_of_threads() -> None:
    layer = ragged_layer([3001, 700, 40], 6, False, 64)
    query, threads = torch.randn(1, 6, 2, 64), torch.get_num_threads()
    found = []
    for number in (1, 2, 5):
        torch.set_num_threads(number)
        found.append(get_backend("native").attend_ragged(query, layer, scale=0.2))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@needs_compiler
def test_large_logits_and_absent_keys() -> None:
    """Logits of a hundred, and biases that take a key away."""
    layer = ragged_layer([900], 7, True, 64)
    layer.bias[::3] = -torch.inf
    check_ragged(
        "native", RaggedLayer(layer.keys * 10, layer.values, layer.cu_seqlens, None, layer.bias), 1, 2, 1, None
    )


def check_ragged(name: str, layer: RaggedLayer, batch: int, groups: int, q_len: int, softcap: float | None) -> None:
    """The backend against one reference call a head."""
    heads, head_dim = layer.num_kv_heads, layer.keys.shape[1]
    query = torch.randn(batch, heads * groups, q_len, head_dim, generator=torch.Generator().manual_seed(4))
    out, lse = get_backend(name).attend_ragged(query, layer, scale=0.2, softcap=softcap)
    for head, (start, end) in enumerate(zip(layer.offsets, layer.offsets[1:], strict=False)):
        rows = slice(head * groups, (head + 1) * groups)
        bias = None if layer.bias is None else layer.bias[start:end].reshape(1, 1, 1, -1)
        keys, values = (t[None, None, start:end].expand(batch, -1, -1, -1) for t in (layer.keys, layer.values))
        expected = attention.attend(query[:, rows], keys, values, scale=0.2, bias=bias, softcap=softcap)
        torch.testing.assert_close(out[:, rows], expected[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse[:, rows], expected[1], atol=1e-5, rtol=1e-5)


def test_without_a_compiler_auto_takes_the_portable_backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("KVZIP_CACHE", str(tmp_path))
    native.load_kernel.cache_clear()
    try:
        assert type(get_backend("auto")).__name__ == "CPUBackend"
        with pytest.raises(BackendError, match=r"no C compiler was found.*backend='cpu'"):
            get_backend("native")
    finally:
        native.load_kernel.cache_clear()
    assert not list(tmp_path.rglob("*.so"))


def test_a_failed_build_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "false")
    monkeypatch.setenv("KVZIP_CACHE", str(tmp_path))
    native.load_kernel.cache_clear()
    try:
        with pytest.raises(BackendError, match="ended with status 1"):
            get_backend("native")
    finally:
        native.load_kernel.cache_clear()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 5), (5, 5), (7, 30)])
@pytest.mark.parametrize("kind", ["open", "causal", "masked", "capped"])
def test_dense_equals_the_reference(name: str, shape: tuple[int, int], kind: str) -> None:
    q_len, kv_len = shape
    gen = torch.Generator().manual_seed(5)
    query = torch.randn(2, 6, q_len, 16, generator=gen)
    keys, values = torch.randn(2, 2, 2, kv_len, 16, generator=gen)
    mask = torch.rand(2, 1, q_len, kv_len, generator=gen) > 0.4 if kind == "masked" else None
    if mask is not None:
        mask[0, 0, 0] = False  # a row that sees nothing
    options = {"mask": mask, "is_causal": kind == "causal", "softcap": 2.0 if kind == "capped" else None}
    expected = attention.attend(query, keys, values, scale=0.25, **options)
    out, lse = get_backend(name).attend(query, keys, values, scale=0.25, **options)
    torch.testing.assert_close(out, expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, expected[1], atol=1e-5, rtol=1e-5)


def plain_varlen(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux, scale, window_size=(-1, -1), enable_gqa=False
):
    """What `torch.nn.attention.varlen.varlen_attn` documents, sequence by sequence; it runs on CUDA alone."""
    assert return_aux.lse and cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert enable_gqa or query.shape[1] == key.shape[1]
    outs, lses = [], []
    for i in range(len(cu_seq_q) - 1):
        q, k, v = (
            t[c[i] : c[i + 1]].transpose(0, 1)[None] for t, c in ((query, cu_seq_q), (key, cu_seq_k), (value, cu_seq_k))
        )
        assert q.shape[2] <= max_q and k.shape[2] <= max_k
        out, lse = attention.attend(q, k, v, scale=scale, is_causal=window_size == (-1, 0))
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0].masked_fill(lse[0] == -torch.inf, torch.inf))  # FlashAttention's sign for rows without keys
    return torch.cat(outs), torch.cat(lses, dim=1)


@pytest.mark.parametrize("transposed", [False, True])
def test_varlen_attention_is_called_as_documented(monkeypatch: pytest.MonkeyPatch, transposed: bool) -> None:
    def library(*args, **kwargs):
        out, lse = plain_varlen(*args, **kwargs)
        return out, lse.transpose(0, 1) if transposed else lse

    monkeypatch.setattr(varlen, "varlen_attn", library)
    monkeypatch.setattr(varlen, "DEVICES", ("cpu",))
    monkeypatch.setattr(varlen, "DTYPES", (torch.float32,))
    check_ragged("varlen", ragged_layer([5, 0, 9], 1, False), 2, 2, 3, None)
    backend, query = get_backend("varlen"), torch.randn(2, 6, 5, 16)
    keys, values = torch.randn(2, 2, 3, 8, 16)
    for is_causal in (False, True):
        expected = attention.attend(query, keys, values, scale=0.25, is_causal=is_causal)
        found = backend.attend(query, keys, values, scale=0.25, is_causal=is_causal)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_the_reference_backend_in_blocks_equals_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvzip.backends import reference

    query, keys = torch.randn(1, 2, 9, 8), torch.randn(1, 1, 9, 8)
    whole = attention.attend(query, keys, keys, scale=0.5, is_causal=True)
    monkeypatch.setattr(reference, "BLOCK_LOGITS", 40)
    blocks = reference.ReferenceBackend().attend(query, keys, keys, scale=0.5, is_causal=True)
    torch.testing.assert_close(blocks[0], whole[0])


def test_an_unknown_backend_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'reference'"):
        get_backend("referense")
