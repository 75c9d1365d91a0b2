"""The GPU backend's classes, where vLLM is installed, without a GPU: what they are to vLLM, and its forward pass with a
plain function in place of FlashAttention's.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from flash import Flash, join
from test_vllm_packed import FULL, MIXED, SCALE, WINDOW, Batch, as_vllm_has_it, layers_of
from test_vllm_plan import BLOCK, DIM, GROUPS, HEADS, INV_FREQ
from torch import Tensor

vllm = pytest.importorskip("vllm.v1.attention.backends.flash_attn", reason="vLLM has an environment of its own")

from vllm.platforms.interface import DeviceCapability  # noqa: E402
from vllm.v1.attention.backend import AttentionCGSupport  # noqa: E402
from vllm.v1.attention.backends import fa_utils  # noqa: E402
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl, FlashAttentionMetadata  # noqa: E402
from vllm.v1.attention.backends.registry import AttentionBackendEnum  # noqa: E402
from vllm.v1.attention.ops.merge_attn_states import merge_attn_states  # noqa: E402

from kvzip.errors import BackendError, ModelError  # noqa: E402
from kvzip.integrations.vllm import register  # noqa: E402
from kvzip.integrations.vllm.gpu import KVZipFlashBackend, KVZipFlashBuilder, KVZipFlashImpl  # noqa: E402
from kvzip.integrations.vllm.plan import PLAN  # noqa: E402
from kvzip.ops.rope import angles  # noqa: E402

MODEL = SimpleNamespace(is_mm_prefix_lm=False, rswa_window=None)
CALLED = (  # with these, and what the backend adds
    *(set(inspect.signature(Flash.__call__).parameters) - {"self"}),
    *("return_softmax_lse", "fa_version", "num_splits"),
)


def test_it_is_what_custom_names() -> None:
    register()
    assert AttentionBackendEnum["CUSTOM"].get_class() is KVZipFlashBackend
    assert AttentionBackendEnum[KVZipFlashBackend.get_name()] is AttentionBackendEnum["CUSTOM"]
    assert KVZipFlashBackend.get_impl_cls() is KVZipFlashImpl
    assert KVZipFlashBackend.get_builder_cls() is KVZipFlashBuilder
    assert not KVZipFlashBackend.forward_includes_kv_cache_update


def test_attention_stays_out_of_graphs_and_metadata_is_never_a_copy() -> None:
    assert KVZipFlashBuilder.get_cudagraph_support(None, None) is AttentionCGSupport.NEVER
    assert not KVZipFlashBuilder.supports_update_block_table


@pytest.mark.parametrize("method", ["forward", "do_kv_cache_update"])
def test_it_is_called_as_its_parent_is(method: str) -> None:
    own, parents = (inspect.signature(getattr(cls, method)) for cls in (KVZipFlashImpl, FlashAttentionImpl))
    assert list(own.parameters) == list(parents.parameters)


@pytest.mark.parametrize(
    ("dtype", "cache_dtype", "reason"),
    [
        (torch.bfloat16, "auto", None),
        (torch.float16, "auto", None),
        (torch.float32, "auto", "dtype not supported"),
        (torch.bfloat16, "fp8", "kv_cache_dtype not supported"),
    ],
)
def test_vllm_asks_it_what_it_takes(dtype: torch.dtype, cache_dtype: Any, reason: str | None) -> None:
    found = KVZipFlashBackend.validate_configuration(
        head_size=128, dtype=dtype, kv_cache_dtype=cache_dtype, block_size=16, use_mla=False, has_sink=False,
        use_sparse=False, use_mm_prefix=False, use_per_head_quant_scales=False,
        device_capability=DeviceCapability(8, 0), attn_type="decoder", use_kv_connector=True,
    )  # fmt: skip
    assert found == [] if reason is None else reason in found


def interface() -> ModuleType:
    """vLLM's wrapper of FlashAttention, read without the package around it, which wants the compiled kernels."""
    path = Path(inspect.getfile(fa_utils)).parents[3] / "vllm_flash_attn" / "flash_attn_interface.py"
    spec = spec_from_file_location("interface", path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_flash_attention_has_the_arguments_that_it_gets() -> None:
    known = inspect.signature(interface().flash_attn_varlen_func).parameters
    assert set(CALLED) <= set(known)


def test_vllms_merge_is_what_the_tests_take_for_it() -> None:
    rng = torch.Generator().manual_seed(0)
    before, after = torch.randn(2, 5, HEADS, DIM, generator=rng)
    lse = torch.randn(2, HEADS, 5, generator=rng)
    lse[0, :, 1], lse[0, :, 2], lse[1, :, 3] = torch.inf, -torch.inf, -torch.inf
    found, wanted = torch.empty(2, *before.shape)
    merge_attn_states(found, before, lse[0], after, lse[1])
    join(wanted, before, lse[0], after, lse[1])
    torch.testing.assert_close(found, wanted)
    assert torch.equal(found[1:3], after[1:3]) and torch.equal(found[3], before[3])
    merge_attn_states(after, before, lse[0], after, lse[1])  # in place, as the backend does
    assert torch.equal(after, found)


def impl_of(window: int | None = None, **changed: Any) -> KVZipFlashImpl:
    impl = KVZipFlashImpl(HEADS * GROUPS, DIM, SCALE, HEADS, None, window, "auto")
    impl.vllm_flash_attn_version, impl.folded_version = 2, 3
    for name, value in changed.items():
        setattr(impl, name, value)
    return impl


def attached(batch: Batch, contexts: dict[str, Any], window: int | None) -> KVZipFlashImpl:
    impl = impl_of(window)
    working = SimpleNamespace(
        handles=batch.handles,
        contexts={key: {3: impl.hold(layer)} for key, layer in contexts.items()},
        block_size=BLOCK,
        config=SimpleNamespace(model_config=MODEL),
    )
    cos, sin = (t[0].float() for t in angles(INV_FREQ, torch.tensor([-BLOCK])))
    impl.attach(working, 3, window, (cos, sin))  # type: ignore[arg-type]
    return impl


def metadata_of(batch: Batch) -> FlashAttentionMetadata:
    return FlashAttentionMetadata(
        num_actual_tokens=len(batch.query),
        max_query_len=int(batch.starts.diff().max()),
        query_start_loc=batch.starts,
        max_seq_len=int(batch.lengths.max()),
        seq_lens=batch.lengths,
        block_table=batch.table,
        slot_mapping=torch.empty(0, dtype=torch.int64),
    )


def cache_of(batch: Batch) -> Tensor:
    """[N, Hkv, block_size, 2 * D], as vLLM hands it over."""
    return torch.cat(batch.cache, dim=-1).transpose(1, 2).contiguous()


@pytest.mark.parametrize("window", [None, WINDOW], ids=["full", "window"])
def test_its_forward_pass_with_a_plain_function_for_the_kernel(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = layers_of(FULL, window)
    batch, flash, versions = as_vllm_has_it(MIXED, layers, window, torch.float32), Flash(), []

    def kernel(**arguments: Any) -> tuple[Tensor, Tensor]:
        assert set(arguments) <= set(CALLED) and arguments.pop("return_softmax_lse")
        versions.append((arguments.pop("fa_version"), arguments["q"].shape[-1], arguments.pop("num_splits")))
        return flash(**arguments)

    monkeypatch.setattr(fa_utils, "flash_attn_varlen_func", kernel, raising=False)
    impl = attached(batch, {str(i): layer for i, layer in enumerate(layers)}, window)
    padded = torch.cat([batch.query, torch.full((3, *batch.query.shape[1:]), torch.nan)])  # as graphs pad it
    output, metadata = torch.full_like(padded, 7.0), metadata_of(batch)
    for _ in range(2):  # two layers of a step
        found = impl.forward(None, padded, padded, padded, cache_of(batch), metadata, output)
    assert found is output and metadata.__dict__[PLAN] is not None
    torch.testing.assert_close(output[: len(batch.query)], batch.wanted, rtol=0, atol=3e-6)
    assert bool((output[len(batch.query) :] == 7.0).all())
    context = [] if window is not None else [(3, DIM + 8, 0)] * 2
    assert versions == [(2, DIM, 0), *context] * 2


@pytest.mark.parametrize("why", ["not attached", "no metadata", "no handles", "none in this batch"])
def test_without_a_context_vllms_own_forward_pass_gets_everything_untouched(
    why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = layers_of(FULL, None)
    batch = as_vllm_has_it(MIXED, layers, None, torch.float32)
    batch = replace(batch, handles={} if why == "no handles" else {9999: "0"})
    impl = impl_of() if why == "not attached" else attached(batch, {"0": layers[0]}, None)
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(FlashAttentionImpl, "forward", lambda self, *given: seen.append(given) or given[6])
    metadata = None if why == "no metadata" else metadata_of(batch)
    output = torch.empty_like(batch.query)
    given = (object(), batch.query, batch.query, batch.query, cache_of(batch), metadata, output, None, None)
    assert impl.forward(*given) is output  # type: ignore[arg-type]
    assert len(seen) == 1 and all(a is b for a, b in zip(seen[0], given, strict=True))


@pytest.mark.parametrize(
    ("changed", "model", "reason"),
    [
        ({"vllm_flash_attn_version": None}, MODEL, "no FlashAttention"),
        ({"fa4_hd256": True}, MODEL, "whole pages"),
        ({"head_size": 512}, MODEL, "more than 256"),
        ({"kv_cache_dtype": "fp8"}, MODEL, "KV cache of fp8"),
        ({}, SimpleNamespace(is_mm_prefix_lm=True, rswa_window=None), "images"),
        ({}, SimpleNamespace(is_mm_prefix_lm=False, rswa_window=64), "prompt visible"),
    ],
)
def test_what_it_can_not_serve_is_refused_at_the_start(changed: dict[str, Any], model: Any, reason: str) -> None:
    working: Any = SimpleNamespace(config=SimpleNamespace(model_config=model))
    with pytest.raises(ModelError, match=reason):
        impl_of(**changed).attach(working, 3, None, (torch.empty(0), torch.empty(0)))


def test_biases_of_wide_heads_are_refused() -> None:
    wide = layers_of(replace(FULL, head_dim=256), None)[0]
    impl = impl_of(head_size=256)
    with pytest.raises(BackendError, match="too wide"):
        impl.hold(wide)
    assert impl.hold(replace(wide, bias=None)).keys.shape[1] == 256
