"""The equalities that must hold, on every model family, with tiny random weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from reference import Reference
from tiny import CONFIGS, SMALL, tiny_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DeepseekV3Config,
    DynamicCache,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    T5Config,
)

from kvzip.backends import get_backend
from kvzip.chunks import RepeatPrompts
from kvzip.compress import Engine, FullContext
from kvzip.context import RaggedContext
from kvzip.errors import ModelError
from kvzip.hf.cache import SessionCache
from kvzip.hf.geometry import probe
from kvzip.ops.ragged import pack_bits

PROMPTS = RepeatPrompts(torch.arange(3, 9), torch.arange(9, 14), torch.arange(14, 18))
NOISE = {
    "atol": 2e-3,
    "rtol": 1e-3,
}  # logits of about 10; weights are large, and the two orders of sums differ


def random_ids(seed: int, length: int) -> torch.Tensor:
    return torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def case(request: pytest.FixtureRequest) -> SimpleNamespace:
    model = tiny_model(request.param)
    engine = Engine(model, probe(model), get_backend(), PROMPTS)
    return SimpleNamespace(
        family=request.param, model=model, engine=engine, prefix=random_ids(0, 7), context=random_ids(1, 150)
    )


def read(case: SimpleNamespace, block_len: int = 64) -> FullContext:
    full = FullContext(case.engine, case.prefix, case.context)
    full.prefill(block_len)
    return full


def random_mask(case: SimpleNamespace, share: float) -> torch.Tensor:
    shape = (len(case.engine.geometry.full_layers), 2, len(case.context))
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(7)) < share
    mask[0, 0] = False  # an empty head
    return mask


def make_context(case: SimpleNamespace, mask: torch.Tensor) -> RaggedContext:
    layers = read(case).evict(mask)
    return RaggedContext(layers, case.prefix.int(), case.context.int(), pack_bits(mask), None, None)


def evicted_of(case: SimpleNamespace, mask: torch.Tensor) -> dict[int, torch.Tensor]:
    prefix = torch.zeros(mask.shape[1], len(case.prefix), dtype=torch.bool)
    return {layer: torch.cat([prefix, ~mask[i]], 1) for i, layer in enumerate(case.engine.geometry.full_layers)}


@torch.inference_mode()
def session_logits(case: SimpleNamespace, data: RaggedContext, question: torch.Tensor, split: int = 0) -> torch.Tensor:
    cache = SessionCache(data, case.engine.backend)
    parts = [question[None, :split], question[None, split:]] if split else [question[None]]
    return torch.cat([case.model(input_ids=p, past_key_values=cache).logits[0] for p in parts])


def test_a_wrapped_model_is_still_itself(case: SimpleNamespace) -> None:
    ids = random_ids(2, 30)[None]
    with torch.inference_mode():
        ours = case.model(ids, past_key_values=DynamicCache(config=case.model.config)).logits[0]
    with Reference(case.model) as reference:
        torch.testing.assert_close(ours, reference.logits(ids[0], 30), **NOISE)


@pytest.mark.parametrize("split", [0, 1, 33])
def test_keep_ratio_one_is_the_models_own_cache(case: SimpleNamespace, split: int) -> None:
    question = random_ids(2, 60)
    data = make_context(case, torch.ones_like(random_mask(case, 1.0)))
    ours = session_logits(case, data, question, split)
    with Reference(case.model) as reference:
        expected = reference.logits(torch.cat([case.prefix, case.context, question]), 60)
    torch.testing.assert_close(ours, expected, **NOISE)


def test_physical_eviction_equals_masking(case: SimpleNamespace) -> None:
    mask, question = random_mask(case, 0.3), random_ids(2, 60)
    ours = session_logits(case, make_context(case, mask), question)
    split = len(case.prefix) + len(case.context)
    with Reference(case.model) as reference:
        whole = torch.cat([case.prefix, case.context, question])
        expected = reference.logits(whole, 60, evicted_of(case, mask), split)
        full = reference.logits(whole, 60)
    torch.testing.assert_close(ours, expected, **NOISE)
    assert (ours - full).abs().max() > 0.1  # the mask matters, so the comparison can fail


def test_a_padded_batch_answers_as_each_question_alone(case: SimpleNamespace) -> None:
    data = make_context(case, random_mask(case, 0.3))
    questions = [random_ids(10 + i, n) for i, n in enumerate([5, 40, 23, 31])]
    ids, mask = torch.zeros(4, 40, dtype=torch.int64), torch.zeros(4, 40, dtype=torch.int64)
    for row, question in enumerate(questions):
        ids[row, 40 - len(question) :], mask[row, 40 - len(question) :] = question, 1
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    batch = case.model.generate(
        ids, attention_mask=mask, past_key_values=SessionCache(data, case.engine.backend), **options
    )
    for row, question in enumerate(questions):
        cache = SessionCache(data, case.engine.backend)
        alone = case.model.generate(question[None], past_key_values=cache, **options)
        assert batch[row, 40:].tolist() == alone[0, len(question) :].tolist()


def test_blocks_of_any_size_read_the_same(case: SimpleNamespace) -> None:
    whole, blocks = read(case, 1000), read(case, 1)
    for a, b in zip(whole.cache.layers, blocks.cache.layers, strict=True):
        torch.testing.assert_close(a.keys, b.keys, **NOISE)
        torch.testing.assert_close(a.values, b.values, **NOISE)


@pytest.mark.parametrize(("faithful", "local"), [(False, False), (True, False), (False, True)])
def test_scores_equal_the_direct_computation(case: SimpleNamespace, faithful: bool, local: bool) -> None:
    full = read(case)
    name = "reconstruction-faithful" if faithful else "reconstruction"
    ours = full.score(name, 40, faithful=faithful, local=local)
    geometry = case.engine.geometry
    layer = geometry.layers[geometry.full_layers[0]]
    from kvzip.chunks import chunk_slices

    chunks = chunk_slices(150, 40, merge_short=not faithful)
    assert [c.stop - c.start for c in chunks] == ([40, 40, 40, 30])
    with Reference(case.model) as reference:
        expected = reference.scores(
            case.prefix, case.context, list(full._replays(chunks)), geometry.full_layers,
            None if faithful else (lambda i: geometry.layers[i].scale), None if faithful else layer.softcap, local,
        )  # fmt: skip
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-3)
    assert ours.min() > 0 and ours.max() <= 1 and ours.std() > 1e-3


def test_a_replay_leaves_the_full_cache_as_it_was(case: SimpleNamespace) -> None:
    full = read(case)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in full.cache.layers]
    full.score("reconstruction", 40)
    for layer, (keys, values) in zip(full.cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)


def test_rewinding_restores_everything(case: SimpleNamespace) -> None:
    data = make_context(case, random_mask(case, 0.3))
    cache, question, other = SessionCache(data, case.engine.backend), random_ids(2, 20), random_ids(3, 90)
    with torch.inference_mode():
        first = case.model(question[None], past_key_values=cache).logits
        cache.rewind(0)
        case.model(other[None], past_key_values=cache)
        cache.rewind(0)
        again = case.model(question[None], past_key_values=cache).logits
    assert torch.equal(first, again)


def test_beams_share_the_context(case: SimpleNamespace) -> None:
    data, question = make_context(case, torch.ones_like(random_mask(case, 1.0))), random_ids(2, 20)
    options = {
        "max_new_tokens": 8,
        "num_beams": 3,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    ours = case.model.generate(question[None], past_key_values=SessionCache(data, case.engine.backend), **options)
    whole = torch.cat([case.prefix, case.context, question])
    plain = case.model.generate(whole[None], **options)
    assert ours[0, 20:].tolist() == plain[0, len(whole) :].tolist()


REFUSED = {
    "encoder-decoder": (lambda: AutoModelForSeq2SeqLM.from_config(T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)), "encoder-decoder"),
    "linear attention": (lambda: AutoModelForCausalLM.from_config(MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1)), "interface"),
    "absolute positions": (lambda: AutoModelForCausalLM.from_config(GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2)), "rotary"),
    "attention sinks": (lambda: AutoModelForCausalLM.from_config(GptOssConfig(**SMALL | {"head_dim": 16}, num_local_experts=2, num_experts_per_tok=1)), "s_aux|depend on the length"),
    "MLA": (lambda: AutoModelForCausalLM.from_config(DeepseekV3Config(**SMALL | {"num_key_value_heads": 4}, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1, first_k_dense_replace=3, moe_intermediate_size=16)), "differ in shape|rotation"),
    "dynamic rope": (lambda: AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})), "depend on the length"),
    "windows only": (lambda: AutoModelForCausalLM.from_config(CONFIGS["mistral"]().__class__(**SMALL, sliding_window=16)), "sliding window"),
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_models_that_can_not_be_served_are_refused_with_the_reason(kind: str) -> None:
    make, reason = REFUSED[kind]
    with pytest.raises(ModelError, match=reason) as caught:
        probe(make().eval())
    assert "\n" not in str(caught.value)
