"""The conversion of GGUF files, and the models that come of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter, TokenType
from model_cache import left_behind, own_cache
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from kvzip.errors import InputError, ModelError
from kvzip.models.catalogue import CATALOGUE
from kvzip.models.fetch import ensure_gguf, ensure_model
from kvzip.models.gguf_config import end_token_ids, llama3_factors, repair_config


@pytest.fixture(autouse=True)
def cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return own_cache(request, tmp_path, monkeypatch)


def tiny_llama(**rope: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=259,
        max_position_embeddings=16384,
        rope_theta=500000.0,
        tie_word_embeddings=True,
        **rope,
    )
    return LlamaForCausalLM(config).eval()


def to_gguf_order(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """llama.cpp keeps the two halves of a rotary pair in neighbouring rows."""
    return weight.reshape(num_heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: LlamaForCausalLM, arch: str = "llama", factors: np.ndarray | None = None) -> Path:
    config = model.config
    writer = GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(500000.0)
    add_vocabulary(writer)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "model.layers.": "blk."}
    names |= {"self_attn.": "attn_", "_proj": "", "attn_o.": "attn_output.", "mlp.": "ffn_"}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    for name, tensor in model.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = to_gguf_order(tensor, tensor.shape[0] // config.head_dim)
        for old, new in names.items():
            name = name.replace(old, new)
        if name != "lm_head.weight":
            writer.add_tensor(name, tensor.numpy().copy())
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_vocabulary(writer: GGUFWriter) -> None:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*alphabet, "ĠĠ", "<|im_start|>", "<|im_end|>"])
    writer.add_token_types([TokenType.NORMAL] * 257 + [TokenType.CONTROL] * 2)
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")


def logits_of(model: LlamaForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(200)[None] % 256).logits


@pytest.mark.parametrize("factor", [None, 8.0, 32.0])
def test_converted_llama_computes_the_same(tmp_path: Path, factor: float | None) -> None:
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    model = tiny_llama(**({"rope_scaling": scaling} if factor else {}))
    factors = llama3_factors(500000.0, 16, factor) if factor else None
    folder = ensure_gguf(write_gguf(tmp_path / "tiny.gguf", model, factors=factors))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.float32 and loaded.generation_config.eos_token_id == [258]
    torch.testing.assert_close(logits_of(loaded), logits_of(model), atol=1e-5, rtol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  1").input_ids) == ["a", "ĠĠ", "1"]
    assert len(tokenizer) == 259 and max(tokenizer("<|endoftext|>").input_ids) < 259
    assert tokenizer.decode(tokenizer("é 12\n<|im_end|>").input_ids) == "é 12\n<|im_end|>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_the_same_gguf_is_converted_once(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    folder = ensure_gguf(path)
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(path.read_bytes())
    assert ensure_gguf(copy, convert=lambda *_: pytest.fail("converted again")) == folder


def test_files_that_are_no_gguf_are_refused(cache: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\x03\x04 a zip file")
    with pytest.raises(InputError, match="not a GGUF file"):
        ensure_gguf(other)
    with pytest.raises(InputError, match="no such GGUF file"):
        ensure_gguf(tmp_path / "missing.gguf")
    with pytest.raises(InputError, match="no such GGUF file"):
        ensure_gguf(tmp_path)


@pytest.mark.parametrize("part", [0.0, 0.001, 0.02, 0.3, 0.999])
def test_truncated_gguf_is_refused(cache: Path, tmp_path: Path, part: float) -> None:
    data = write_gguf(tmp_path / "tiny.gguf", tiny_llama()).read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(data[: 4 + int(part * len(data))])
    with pytest.raises(InputError, match="damaged or truncated"):
        ensure_gguf(cut)
    assert left_behind(cache) == []


def test_other_architectures_and_foreign_tensors_are_refused(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="architecture 'rwkv6'"):
        ensure_gguf(write_gguf(tmp_path / "rwkv.gguf", tiny_llama(), arch="rwkv6"))
    with pytest.raises(ModelError, match="rope_freqs"):
        ensure_gguf(write_gguf(tmp_path / "rope.gguf", tiny_llama(), factors=np.linspace(1, 3, 8)))
    with pytest.raises(ModelError, match=r"no place|not hold"):
        ensure_gguf(write_gguf(tmp_path / "qwen.gguf", tiny_llama(), arch="qwen2"))
    assert left_behind(cache) == []


def test_configuration_is_repaired_from_the_metadata() -> None:
    raw = {
        "num_hidden_layers": 62,
        "hidden_size": 5376,
        "num_attention_heads": 32,
        "rms_norm_eps": 9.999999974752427e-07,
    }
    meta = {
        "general.architecture": "gemma3",
        "gemma3.attention.key_length": 128,
        "gemma3.attention.sliding_window": 1024,
        "gemma3.rope.scaling.type": "linear",
        "gemma3.rope.scaling.factor": 8.0,
    }
    config = repair_config(raw, meta, None)
    assert config["rms_norm_eps"] == 1e-6 and config["head_dim"] == 128 and config["sliding_window"] == 1024
    assert config["query_pre_attn_scalar"] == 168
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert repair_config(raw | {"num_hidden_layers": 34}, meta, None)["query_pre_attn_scalar"] == 128
    with pytest.raises(ModelError, match="'yarn'"):
        repair_config(raw, meta | {"gemma3.rope.scaling.type": "yarn"}, None)


def test_end_tokens_start_with_the_named_one() -> None:
    vocabulary = {"<|endoftext|>": 7, "<|im_end|>": 9, "x": 1}
    assert end_token_ids(9, vocabulary) == [9, 7]
    assert end_token_ids(None, vocabulary) == [9, 7]


# --- real models ---

GEMMA_PATTERN = (["sliding_attention"] * 5 + ["full_attention"]) * 3
REAL_CONFIG = {
    "smollm2-135m": {"model_type": "llama", "hidden_size": 576, "num_key_value_heads": 3, "rms_norm_eps": 1e-5},
    "qwen2.5-coder-0.5b": {"model_type": "qwen2", "hidden_size": 896, "num_key_value_heads": 2, "rms_norm_eps": 1e-6},
    "gemma3-270m": {
        "model_type": "gemma3_text",
        "hidden_size": 640,
        "num_hidden_layers": 18,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 512,
        "layer_types": GEMMA_PATTERN,
    },
}
REAL_THETA = {"smollm2-135m": 1e5, "qwen2.5-coder-0.5b": 1e6, "gemma3-270m": 1e6}
REAL_END = {"smollm2-135m": "<|im_end|>", "qwen2.5-coder-0.5b": "<|im_end|>", "gemma3-270m": "<eos>"}
SAMPLES = (
    "The capital of France is",
    "  two  spaces\n\n\n\ttabs, é 日本語 🎉 12345 a  1\ndef f(x):\n    return x\n",
    "a<|im_end|>b<end_of_turn>c",
)
PARAGRAPH = (
    "The history of the lighthouse begins with fires lit on hilltops to guide sailors home. As trade grew along the "
    "coasts of the Mediterranean, towers were built so that the flame could be seen from farther away. The most famous "
    "of these was the Pharos of Alexandria, which stood for more than a thousand years and was counted among the seven "
    "wonders of the ancient world."
)


@pytest.fixture(params=CATALOGUE, scope="module")
def real(request: pytest.FixtureRequest) -> tuple[str, AutoModelForCausalLM, AutoTokenizer]:
    folder = ensure_model(request.param)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return request.param, model.eval(), AutoTokenizer.from_pretrained(folder)


@pytest.mark.real
def test_real_configuration(real: tuple) -> None:
    name, model, _ = real
    config = model.config.to_dict()
    assert {key: config[key] for key in REAL_CONFIG[name]} == REAL_CONFIG[name]
    assert config["max_position_embeddings"] == CATALOGUE[name].max_positions
    rope = config["rope_parameters"]
    assert rope.get("full_attention", rope)["rope_theta"] == REAL_THETA[name]
    assert rope.get("sliding_attention", {}).get("rope_theta", 1e4) == 1e4


@pytest.mark.real
def test_real_tokenizer(real: tuple) -> None:
    name, model, tokenizer = real
    for text in SAMPLES:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert (tokenizer.chat_template is not None) == CATALOGUE[name].has_chat_template
    assert tokenizer.eos_token == REAL_END[name]
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id
    has_bos = tokenizer("x").input_ids[0] == tokenizer.bos_token_id
    assert has_bos == (name == "gemma3-270m")


@pytest.mark.real
def test_real_model_is_sane_and_deterministic(real: tuple) -> None:
    _, model, tokenizer = real
    ids = tokenizer(SAMPLES[0], return_tensors="pt").input_ids
    first, second = (model.generate(ids, max_new_tokens=12, do_sample=False) for _ in range(2))
    assert torch.equal(first, second) and "France" in tokenizer.decode(first[0])
    ids = tokenizer(PARAGRAPH, return_tensors="pt").input_ids
    with torch.no_grad():
        assert model(ids, labels=ids).loss.exp() < 30
