"""Some of a layer's heads alone: what one rank of several computes."""

from __future__ import annotations

import pytest
import torch
from random_context import Shape, random_context
from stored import LEVELS_SHAPE, MIXED_SHAPE

from kvzip.backends import get_backend
from kvzip.context import RaggedLayer

SHAPES = {
    "floats": Shape(num_kv_heads=4, has_bias=True),
    "codes": Shape(num_kv_heads=4, head_dim=8, has_bias=True, levels=LEVELS_SHAPE.levels[:1], context_len=60),
    "levels": Shape(num_kv_heads=4, head_dim=8, levels=LEVELS_SHAPE.levels, context_len=60),
    "mixed": Shape(num_kv_heads=4, head_dim=8, levels=MIXED_SHAPE.levels, context_len=60),
}


def attended(layer: RaggedLayer, query: torch.Tensor, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    return get_backend(backend).attend_ragged(query, layer, scale=0.5)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("kind", SHAPES)
def test_heads_alone_put_out_what_they_do_among_all(kind: str, backend: str) -> None:
    context, _ = random_context(SHAPES[kind], seed=3)
    query = torch.randn(1, 8, 3, SHAPES[kind].head_dim, generator=torch.Generator().manual_seed(1))
    for layer in context.layers:
        whole, whole_lse = attended(layer, query, backend)
        for start, stop in ((0, 2), (1, 2), (2, 4), (0, 4), (1, 1)):
            part = layer.heads(start, stop)
            assert part.seqlens == layer.seqlens[start:stop]
            if stop > start:
                out, lse = attended(part, query[:, 2 * start : 2 * stop], backend)
                torch.testing.assert_close(out, whole[:, 2 * start : 2 * stop], rtol=0, atol=1e-6)
                torch.testing.assert_close(lse, whole_lse[:, 2 * start : 2 * stop], rtol=0, atol=1e-6)


def test_heads_alone_are_views() -> None:
    layer = random_context(SHAPES["codes"])[0].layers[0]
    for part, whole in ((layer.heads(1, 3).keys, layer.keys), (layer.heads(1, 3).values, layer.values)):
        assert part.codes.untyped_storage().data_ptr() == whole.codes.untyped_storage().data_ptr()
        assert part.scales.untyped_storage().data_ptr() == whole.scales.untyped_storage().data_ptr()
