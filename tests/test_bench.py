"""The benchmarks at a small size: what they report, and the page made of it. No time is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

import kvzip
from kvzip.bench import measure, plots, scale
from kvzip.bench.certificate import bench_certificate
from kvzip.bench.compress import bench_compress
from kvzip.bench.decode import bench_decode
from kvzip.bench.distill import bench_distill
from kvzip.bench.memory import bench_memory
from kvzip.bench.open import bench_open
from kvzip.bench.refit import bench_refit
from kvzip.bench.replay import bench_replay
from kvzip.bench.report import load_results, results_page
from kvzip.bench.sections import SECTIONS
from kvzip.bench.served import truncated_kl
from kvzip.bench.synthetic import head_counts, random_context
from kvzip.errors import InputError

ROOT = Path(__file__).parents[1]
PARAGRAPHS = [
    {
        "context": f"The lamp of tower {i} was lit in {1800 + i}.",
        "qas": [{"question": f"When was lamp {i} lit?", "answers": [{"text": str(1800 + i)}]}] * 2,
    }
    for i in range(30)
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[kvzip.LLM]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVZIP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield kvzip.wrap(tiny_model("gemma3", seed=3), tiny_tokenizer())


@pytest.fixture(scope="module")
def squad(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("squad") / "squad.json"
    path.write_text(json.dumps({"data": [{"title": "Lamps", "paragraphs": PARAGRAPHS}]}))
    return str(path)


@pytest.fixture(scope="module")
def results(tiny: kvzip.LLM, squad: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a result of every benchmark."""
    folder = tmp_path_factory.mktemp("results")
    tiny.distill(["Neither lamps nor towers, but a text of some length about nothing. " * 8], "a test")
    found = [
        bench_distill(tiny, 600, 2, squad),
        bench_compress(tiny, 300, 0.3, 2),
        bench_open(tiny, 300, 0.3, 2),
        bench_memory(tiny, 300, 0.3, 1),
        bench_decode(tiny, 300, 0.3, 1),
        bench_replay(tiny, 600, 1, squad),
        bench_refit(tiny, 300, 0.4, 1, squad),
        bench_certificate(tiny, 1000, 1, squad),
        scale.bench_scale([2100, 4500], 0.3, "local"),
    ]
    for result in found:
        measure.write_result(result, folder / f"{result['bench']}.json")
    return folder


def test_every_figure_has_median_spread_and_number(results: Path) -> None:
    for result in load_results(results):
        assert {"command", "date", "kvzip", "packages", "machine", "threads", "ceilings"} <= set(result)
        assert all(value > 0 for value in result["ceilings"].values())
        for figure in result["figures"].values():
            assert figure["n"] == len(figure["values"]) > 0
            assert figure["min"] <= figure["median"] <= figure["max"]


def test_ratios_are_taken_pair_by_pair(results: Path) -> None:
    figures = json.loads((results / "compress.json").read_text())["figures"]
    pairs = zip(figures["compress_s"]["values"], figures["plain_prefill_s"]["values"], strict=True)
    assert figures["compress_over_prefill"]["values"] == [a / b for a, b in pairs]


def test_the_page_shows_every_result_and_its_picture(results: Path, tmp_path: Path) -> None:
    pictures = plots.draw(load_results(results), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(pictures.values()) == ["decode.svg", "scale.svg"]
    page = results_page(results, pictures)
    assert page.count("How these were measured:") == 9
    assert all(f"]({name})" in page for name in pictures.values())
    assert "nan" not in page and str(Path.home()) not in page


def test_the_page_shows_parity(results: Path, tmp_path: Path) -> None:
    """A result as bench/parity.py writes it; a stage that did not happen has no row."""
    result = load_results(results)[0] | {
        "bench": "parity",
        "stages": {"as_is": "both as they are", "rebuilt": "budget too", "only_chunks": "chunks"},
        "answers": [{"answers": "kvpress", "included": [0.5, 0.1], "f1": [0.25, 0.0625], "same": {"kvzip": [3, 4]}}],
    }
    names = [f"{stage}_overlap_{ratio}" for stage in ("as_is", "rebuilt") for ratio in (0.5, 0.3, 0.1)]
    result["figures"] = {name: measure.summary([0.9875]) for name in [*names, "as_is_spearman"]}
    measure.write_result(result, tmp_path / "parity.json")
    page = results_page(tmp_path)
    assert "| both as they are | 0.9875 | 0.9875 |" in page and "| budget too | - | - | 0.9875 |" in page
    assert "| kvpress | 0.500 ± 0.100 | 0.250 ± 0.062 | 3 of 4 as kvzip |" in page and "chunks |" not in page


def test_drawing_again_gives_the_same_bytes(results: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        plots.draw(load_results(results), folder)
    assert (folders[0] / "decode.svg").read_bytes() == (folders[1] / "decode.svg").read_bytes()


def test_files_that_are_no_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no result files"):
        results_page(tmp_path)
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(InputError, match=r"x\.json is not a result file"):
        results_page(tmp_path)


def test_the_committed_page_is_made_of_the_committed_results() -> None:
    docs, folder = ROOT / "docs", ROOT / "bench" / "results"
    pictures = {
        path.stem: path.name for path in docs.glob("*.svg") if path.stem in SECTIONS or path.stem[:5] == "eval-"
    }
    assert (docs / "results.md").read_text(encoding="utf-8") == results_page(folder, pictures)


def test_random_heads_are_unequal_and_add_up() -> None:
    counts = head_counts(24, 2, 4000, 0.3)
    assert counts.sum().item() == pytest.approx(0.3 * counts.numel() * 4000, rel=1e-3)
    assert counts.max() == 4000 > 4 * counts.min()
    assert (head_counts(2, 3, 50, 1.0) == 50).all()


def test_a_random_context_has_the_shape_that_it_says(tiny: kvzip.LLM) -> None:
    data = random_context(tiny, 100, 0.3).data
    assert [layer.window for layer in data.layers] == [layer.window for layer in tiny.geometry.layers]
    per_head = [counts for counts, layer in zip(data.pairs_per_head, data.layers, strict=True) if layer.window is None]
    assert data.keep_mask.sum(-1).tolist() == per_head


def test_a_busy_machine_is_noticed() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        time.sleep(0.3)
        busy = measure.busy_cores()
        other.kill()
    assert busy is None or busy > 0.3


def test_a_command_names_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/kvzip", "bench", "open", "--text", "/data/a.json"])
    assert measure._command() == "kvzip bench open --text a.json"


def test_a_divergence_over_some_tokens_is_no_more_than_the_whole() -> None:
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        full, other = (torch.randn(40, generator=rng).mul(2).log_softmax(0) for _ in range(2))
        whole = float((full.exp() * (full - other)).sum())
        every, theirs = dict(enumerate(full.tolist())), dict(enumerate(other.tolist()))
        assert truncated_kl(every, theirs) == pytest.approx(whole, abs=1e-5)
        some = dict(sorted(every.items(), key=lambda item: -item[1])[:8])
        assert 0 <= truncated_kl(some, theirs) <= whole + 1e-6
        assert truncated_kl(some, every) == pytest.approx(0, abs=1e-6)
