"""Every backend equals the reference on dense, masked and ragged input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvzip.backends import BACKENDS, get_backend
from kvzip.context import RaggedLayer
from kvzip.errors import UnknownNameError
from kvzip.ops import attention

NAMES = sorted(BACKENDS)
LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=3)


def ragged_layer(lengths: list[int], seed: int, with_bias: bool) -> RaggedLayer:
    gen = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    keys, values = torch.randn(2, total, 16, generator=gen)
    return RaggedLayer(keys, values, offsets, None, torch.randn(total, generator=gen) if with_bias else None)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(1, 2), st.integers(1, 3), st.integers(1, 5), st.booleans(), st.booleans())
def test_ragged_equals_one_dense_call_a_head(
    name: str, lengths: list[int], batch: int, groups: int, q_len: int, with_bias: bool, capped: bool
) -> None:
    layer = ragged_layer(lengths, 3, with_bias)
    query = torch.randn(batch, len(lengths) * groups, q_len, 16, generator=torch.Generator().manual_seed(4))
    softcap = 3.0 if capped else None
    out, lse = get_backend(name).attend_ragged(query, layer, scale=0.2, softcap=softcap)
    for head, (start, end) in enumerate(zip(layer.offsets, layer.offsets[1:], strict=False)):
        rows = slice(head * groups, (head + 1) * groups)
        bias = layer.bias[start:end].reshape(1, 1, 1, -1) if with_bias else None
        keys, values = (t[None, None, start:end].expand(batch, -1, -1, -1) for t in (layer.keys, layer.values))
        expected = attention.attend(query[:, rows], keys, values, scale=0.2, bias=bias, softcap=softcap)
        torch.testing.assert_close(out[:, rows], expected[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse[:, rows], expected[1], atol=1e-5, rtol=1e-5)


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
