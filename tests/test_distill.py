"""Scores without a replay: the fit, how its weights are kept, and that the scorer foretells what it was fitted to."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from tiny import tiny_model, tiny_tokenizer

import kvzip
from kvzip.chunks import CHUNK_LEN, chunk_slices
from kvzip.compress import FullContext
from kvzip.distill import MIN_LEN, Distiller, fit_surrogate, split_contexts
from kvzip.errors import FileError, InputError, ModelError
from kvzip.methods import parse_method
from kvzip.ops.regression import LeastSquares, kept_overlap, rank_correlation
from kvzip.scorers import distilled
from kvzip.scorers.distilled import DistilledScorer, num_features
from kvzip.surrogates import LARGEST_WEIGHT, load_surrogate, save_surrogate, surrogate_path

TEXT = "The quick brown fox jumps over the lazy dog, 1234 times, while nobody looks at it. " * 6
OTHER = "Whoever keeps a diary of the weather will find, after many years, that it was rarely as remembered. " * 4
FAST = parse_method("kvzip-fast")
SEEDS = st.integers(0, 2**16)
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def with_place(rows: torch.Tensor) -> torch.Tensor:
    place = (torch.arange(len(rows)) / len(rows)).unsqueeze(1)
    return torch.cat([rows, place, place**2, torch.full_like(place, math.log(len(rows)))], dim=1)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma3", "phi3"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[kvzip.LLM]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVZIP_CACHE", str(tmp_path_factory.mktemp("cache")))
        model = kvzip.wrap(tiny_model(request.param, seed=3), tiny_tokenizer())
        model.distill([TEXT, OTHER], "a test")
        yield model


@pytest.fixture
def qwen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> kvzip.LLM:
    monkeypatch.setenv("KVZIP_CACHE", str(tmp_path))
    return kvzip.wrap(tiny_model("qwen2", seed=3), tiny_tokenizer())


def weights_of(llm: kvzip.LLM) -> dict[str, torch.Tensor]:
    shape = llm.geometry.full_shape
    return dict(load_surrogate(llm.fingerprint, shape, num_features(llm.model.config.hidden_size, shape[1])))


def solved(inputs: torch.Tensor, targets: torch.Tensor, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by one stacked system: rows of standardised inputs, below them those that stand for the penalty."""
    x, y = inputs.double(), targets.double()
    mean, scale = x.mean(0), x.std(0, correction=0)
    x = torch.where(scale > 1e-4 * x.square().mean(0).sqrt(), x, mean)
    rows = torch.cat([(x - mean) / scale, (penalty * len(x)) ** 0.5 * torch.eye(x.shape[1], dtype=torch.float64)])
    right = torch.cat([y - y.mean(0), torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64)])
    weight = torch.linalg.lstsq(rows, right).solution / scale.unsqueeze(1)
    return weight.float(), (y.mean(0) - mean @ weight).float()


@settings(deadline=None)
@given(SEEDS, st.integers(2, 60), st.integers(1, 9), st.integers(1, 3), st.integers(1, 7), st.floats(1e-4, 1))
def test_sums_over_blocks_give_what_all_rows_at_once_give(
    seed: int, num_rows: int, num_inputs: int, num_targets: int, block: int, penalty: float
) -> None:
    inputs = random(seed, num_rows, num_inputs) * random(seed + 1, num_inputs).exp() + random(seed + 2, num_inputs)
    targets = random(seed + 3, num_rows, num_targets) - 5
    sums = LeastSquares(num_inputs, num_targets)
    for rows, wanted in zip(inputs.split(block), targets.split(block), strict=True):
        sums.add(rows, wanted)
    for found, expected in zip(sums.solve(penalty), solved(inputs, targets, penalty), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_a_linear_map_is_found_and_what_never_varies_has_no_weight() -> None:
    inputs, weight, bias = random(0, 500, 6), random(1, 6, 2), random(2, 2)
    inputs[:, 3] = 1e3 + 1 / 3
    sums = LeastSquares(6, 2)
    sums.add(inputs, inputs.index_fill(1, torch.tensor(3), 0) @ weight + bias)
    found, offset = sums.solve(1e-9)
    expected = weight.index_fill(0, torch.tensor(3), 0)
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(offset, bias, **CLOSE)
    assert not found[3].any()


def test_rank_correlation_and_overlap() -> None:
    first = random(0, 2, 2, 125)
    assert rank_correlation(first, first.exp()) == pytest.approx(1)
    assert rank_correlation(first, -first) == pytest.approx(-1)
    assert abs(rank_correlation(first, random(1, 2, 2, 125))) < 0.2
    assert kept_overlap(first, first.exp(), 0.3) == 1 and kept_overlap(first, -first, 0.3) == 0
    assert kept_overlap(first, -first, 0.75) == pytest.approx(2 / 3, abs=1e-2)


def test_contexts_are_of_two_lengths_and_are_one_chunk() -> None:
    for length in (2, 201, 1500, 2666, 2667, 4999, 5001, 10_000):
        parts = split_contexts(torch.arange(length))
        assert torch.equal(torch.cat(parts), torch.arange(length)) and len(parts) >= 2
        longs, shorts = ([len(part) for part in parts[first::2]] for first in (0, 1))
        assert 0 < max(longs) <= CHUNK_LEN and len(longs) == len(shorts)
        assert length < 200 or all(2.9 < long / short < 3.1 for long, short in zip(longs, shorts, strict=True))
        assert max(longs) - min(longs) <= 1 and max(shorts) - min(shorts) <= 1


@pytest.mark.parametrize("length", [1, 999, 1000, 2000, 2999, 3000, 4000, 6999, 7000])
def test_places_are_those_in_the_chunks_of_a_replay(length: int) -> None:
    expected = [
        [i / (c.stop - c.start), (i / (c.stop - c.start)) ** 2, math.log(c.stop - c.start)]
        for c in chunk_slices(length, CHUNK_LEN)
        for i in range(c.stop - c.start)
    ]
    torch.testing.assert_close(distilled.places(length), torch.tensor(expected))


def slow_fit(llm: kvzip.LLM, contexts: list[torch.Tensor], penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs from the model's own hidden states, norms from its own cache, scores from a replay: one big system."""
    weights, biases = [], []
    prefix = torch.tensor(llm.prefix_ids())
    for row, layer in enumerate(llm.geometry.full_layers):
        inputs, targets = [], []
        for ids in contexts:
            seen: list[torch.Tensor] = []
            handle = llm.model.model.layers[layer].self_attn.register_forward_pre_hook(
                lambda _, args, kwargs, seen=seen: seen.append(kwargs["hidden_states"][0]), with_kwargs=True
            )
            full = FullContext(llm.engine(), prefix, ids)
            full.prefill(block_len=10_000)
            handle.remove()
            pairs = [part[0].norm(dim=-1).T for part in full.cache.layers[layer].read(slice(len(prefix), full.length))]
            norms = torch.cat(pairs, dim=1)
            inputs.append(with_place(torch.cat([seen[0][len(prefix) :], norms, norms.log()], dim=1)))
            targets.append(full.score()[row].clamp_min(1e-6).log().T)
        weight, bias = solved(torch.cat(inputs), torch.cat(targets), penalty)
        weights.append(weight)
        biases.append(bias)
    return torch.stack(weights), torch.stack(biases)


@torch.inference_mode()
def test_weights_are_those_of_a_direct_fit(llm: kvzip.LLM) -> None:
    contexts = [llm.tokenize(TEXT), llm.tokenize(OTHER)]
    distiller = Distiller(llm.engine(), torch.tensor(llm.prefix_ids()))
    for ids in contexts:
        distiller.add(ids)
    profile, (weight, bias) = distiller.profile(), slow_fit(llm, contexts, 0.03)
    torch.testing.assert_close(profile["weight"], weight, atol=1e-3, rtol=1e-2)
    torch.testing.assert_close(profile["bias"], bias, atol=1e-2, rtol=1e-2)


def test_shapes_determinism_and_what_is_held_out(qwen: kvzip.LLM) -> None:
    found = qwen.distill([TEXT, OTHER], "a test")
    content = found.path.read_bytes()
    size = len(qwen.tokenize(f"{TEXT}\n\n{OTHER}"))
    assert found.path == surrogate_path(qwen.fingerprint) and found.num_tokens == size
    assert found.num_held_out in (size // 4, size - size // 4), "one of two contexts"
    assert -1 <= found.held_out.rank_correlation <= 1 and set(found.held_out.overlap) == {0.5, 0.3}
    weights = weights_of(qwen)
    assert weights["weight"].shape == (3, 64 + 4 * 2 + 3, 2) and weights["bias"].shape == (3, 2)
    again = qwen.distill([TEXT, OTHER], "a test")
    assert again.path.read_bytes() == content and again.held_out == found.held_out
    seeds = [qwen.distill([TEXT, OTHER], "a test", seed=seed) for seed in (1, 2, 3)]
    assert len({s.held_out.rank_correlation for s in seeds}) == 2, "another context is held out"
    for name, value in weights_of(qwen).items():
        torch.testing.assert_close(value, weights[name], atol=1e-4, rtol=1e-3)  # the sums have another order


def test_what_is_reported_is_of_text_that_the_weights_did_not_know(qwen: kvzip.LLM) -> None:
    ids, prefix = qwen.tokenize(TEXT + OTHER), torch.tensor(qwen.prefix_ids())
    _, held_out, num_held_out = fit_surrogate(qwen.engine(), prefix, ids)
    parts = split_contexts(ids)
    order = torch.randperm(2, generator=torch.Generator().manual_seed(0)).tolist()
    assert num_held_out == len(parts[order[0]])
    distiller = Distiller(qwen.engine(), prefix)
    distiller.add(parts[order[1]])
    profile = distiller.profile()
    full = FullContext(qwen.engine(), prefix, parts[order[0]])
    full.prefill()
    truth, foretold = full.score(), full.score("distilled", profile=profile)
    assert held_out.rank_correlation == pytest.approx(rank_correlation(truth, foretold))
    assert held_out.overlap[0.3] == pytest.approx(kept_overlap(truth, foretold, 0.3))


def test_progress_rises_to_the_number_of_tokens(qwen: kvzip.LLM) -> None:
    seen: list[tuple[str, float, float | None]] = []
    found = qwen.distill([TEXT, OTHER], progress=lambda *report: seen.append(report))
    assert {(phase, total) for phase, _, total in seen} == {("distill", found.num_tokens)}
    done = [amount for _, amount, _ in seen]
    assert done == sorted(done) and done[0] == 0 and done[-1] == pytest.approx(found.num_tokens)


def test_texts_that_do_not_do_are_refused(qwen: kvzip.LLM) -> None:
    with pytest.raises(InputError, match=f"give at least {MIN_LEN}"):
        qwen.distill(["a few words"])
    with pytest.raises(InputError, match="give a text of at least one word"):
        qwen.distill([TEXT, " "])
    with pytest.raises(InputError, match="0 tokens"):
        qwen.distill([])


@torch.inference_mode()
def test_scores_are_the_exponential_of_a_linear_map(llm: kvzip.LLM) -> None:
    weights, prefilled = weights_of(llm), llm.prefill(OTHER)
    scores, full = prefilled.scores(FAST), prefilled._full
    prefix_len = full.prefix_ids.numel()
    ids = torch.cat([full.prefix_ids, full.context_ids])
    for row, layer in enumerate(llm.geometry.full_layers):
        seen: list[torch.Tensor] = []
        handle = llm.model.model.layers[layer].self_attn.register_forward_pre_hook(
            lambda _, args, kwargs, seen=seen: seen.append(kwargs["hidden_states"][0]), with_kwargs=True
        )
        llm.model(ids[None])
        handle.remove()
        pairs = full.cache.layers[layer].read(slice(prefix_len, full.length))
        norms = torch.cat([part[0].norm(dim=-1).T for part in pairs], dim=1)
        rows = with_place(torch.cat([seen[0][prefix_len:], norms, norms.log()], dim=1))
        expected = (rows @ weights["weight"][row] + weights["bias"][row]).exp().T
        torch.testing.assert_close(scores[row], expected, atol=1e-5, rtol=1e-2)


def test_scores_while_reading_are_those_of_reading_again(llm: kvzip.LLM) -> None:
    direct = llm.compress(OTHER, 0.4, method="kvzip-fast").data
    later = llm.prefill(OTHER).compress(kvzip.CompressOptions(keep_ratio=0.4, method="kvzip-fast")).data
    assert torch.equal(direct.keep_mask, later.keep_mask) and torch.equal(direct.ranks, later.ranks)
    assert direct.info.method == "distilled+floored:alpha=0.5"
    assert direct.keep_mask.sum() == round(0.4 * direct.keep_mask.numel())
    truth = llm.prefill(OTHER).compress(0.4).data
    assert not torch.equal(direct.keep_mask, truth.keep_mask), "they are foretold, not known"


@pytest.mark.parametrize("block_len", [1, 37, 64])
def test_blocks_do_not_matter(llm: kvzip.LLM, block_len: int) -> None:
    scores = []
    for length in (block_len, 10_000):
        full = FullContext(llm.engine(), torch.tensor(llm.prefix_ids()), llm.tokenize(OTHER)[:150])
        full.prefill(length, scorer_name="distilled", profile=weights_of(llm))
        scores.append(full.score("distilled", profile=weights_of(llm)))
    torch.testing.assert_close(scores[0], scores[1], atol=1e-5, rtol=1e-3)
    assert scores[0].std() > 0.1 * scores[0].mean()


def test_nothing_is_replayed_and_inputs_of_one_layer_are_held(llm: kvzip.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FullContext, "replay", lambda *args, **kwargs: pytest.fail("replayed"))
    held: list[int] = []
    watch = DistilledScorer.watch
    hooks = "kvzip.compress.attention_inputs"
    from kvzip.hf.projections import attention_inputs

    stores: list[dict[int, torch.Tensor]] = []

    class Watched:
        def __init__(self, *args: object) -> None:
            self.inner = attention_inputs(*args)

        def __enter__(self) -> dict[int, torch.Tensor]:
            stores.append(self.inner.__enter__())
            return stores[-1]

        def __exit__(self, *args: object) -> None:
            self.inner.__exit__(*args)

    monkeypatch.setattr(hooks, Watched)
    monkeypatch.setattr(DistilledScorer, "watch", lambda *args: (held.append(len(stores[-1])), watch(*args))[1])
    llm.compress(OTHER, 0.4, method="kvzip-fast")
    assert held and not any(held), "taken out before the next layer"


def test_foretold_scores_agree_with_what_they_were_fitted_to(llm: kvzip.LLM) -> None:
    prefilled = llm.prefill(TEXT)
    truth, foretold = prefilled.scores(parse_method("kvzip")), prefilled.scores(FAST)
    assert rank_correlation(truth, foretold) > 0.5
    assert kept_overlap(truth, foretold, 0.3) > 0.5


def test_shared_layers_leave_the_weights_of_the_others(qwen: kvzip.LLM) -> None:
    qwen.distill([TEXT, OTHER])
    qwen.calibrate("kvsharer", TEXT, num_layers=1)
    method = parse_method("kvzip-fast+kvsharer")
    geometry = qwen.geometry_of(method)
    weights, profile = weights_of(qwen), qwen.profile_for(method.needs, geometry)
    assert profile is not None and len(geometry.full_layers) == 2
    assert torch.equal(profile["weight"], weights["weight"][list(geometry.full_layers)])
    data = qwen.compress(OTHER, 0.5, method="kvzip-fast+kvsharer").data
    again = qwen.prefill(OTHER).compress(kvzip.CompressOptions(keep_ratio=0.5, method="kvzip-fast+kvsharer")).data
    assert data.keep_mask.shape[0] == 2 and torch.equal(data.keep_mask, again.keep_mask)


def test_a_model_whose_attention_is_not_found_is_refused(qwen: kvzip.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    qwen.distill([TEXT, OTHER])
    monkeypatch.setattr("kvzip.hf.projections._attention_modules", lambda model: {})
    with pytest.raises(ModelError, match="is not found, so its inputs can't be watched") as caught:
        qwen.compress(OTHER, 0.5, method="kvzip-fast")
    assert "\n" not in str(caught.value)


def refused(llm: kvzip.LLM, match: str) -> None:
    with pytest.raises(ModelError, match=match) as caught:
        llm.compress(OTHER, 0.5, method="kvzip-fast")
    assert "kvzip distill -m MODEL" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_weights_name_the_command_that_makes_them(qwen: kvzip.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prefilled, read = qwen.prefill(OTHER), FullContext.prefill
    monkeypatch.setattr(FullContext, "prefill", lambda *args, **kwargs: pytest.fail("read"))
    refused(qwen, "no distilled weights")
    with pytest.raises(ModelError, match="kvzip distill -m MODEL"):
        prefilled.compress(kvzip.CompressOptions(keep_ratio=0.5, method="kvzip-fast"))
    monkeypatch.setattr(FullContext, "prefill", read)
    assert qwen.compress(OTHER, 1.0, method="kvzip-fast").data.keep_mask.all(), "nothing to choose"


def test_damaged_and_foreign_weights_are_refused(qwen: kvzip.LLM) -> None:
    path = qwen.distill([TEXT, OTHER]).path
    good, weights = path.read_bytes(), weights_of(qwen)
    for content in (b"", b"not safetensors", good[:-1], good[: len(good) // 2], good + b"x", good + bytes(1 << 17)):
        path.write_bytes(content)
        refused(qwen, "can't be read")
    about = {"format": 2, "fingerprint": qwen.fingerprint, "source": ""}
    wrong = [
        (weights, about | {"fingerprint": "another"}),
        (weights, about | {"format": 1}),
        ({"weight": weights["weight"]}, about),
        (weights | {"more": torch.zeros(1)}, about),
        (weights | {"weight": weights["weight"][:, 1:].contiguous()}, about),
        (weights | {"bias": weights["bias"].T.contiguous()}, about),
        (weights | {"bias": weights["bias"].half()}, about),
        (weights | {"bias": weights["bias"] * float("nan")}, about),
        (weights | {"weight": weights["weight"].index_fill(1, torch.tensor(0), float("inf"))}, about),
        (weights | {"weight": weights["weight"].index_fill(1, torch.tensor(0), 2 * LARGEST_WEIGHT)}, about),
    ]
    for tensors, claims in wrong:
        path.write_bytes(save(tensors, {"kvzip": json.dumps(claims)}))
        refused(qwen, "do not fit this model")
    for metadata in (None, {"other": "{}"}, {"kvzip": "{"}, {"kvzip": "[]"}, {"kvzip": "{}"}):
        path.write_bytes(save(weights, metadata))
        refused(qwen, "can't be read")
    path.write_bytes(good)
    assert qwen.compress(OTHER, 0.5, method="kvzip-fast")


def test_largest_weights_that_are_allowed_give_finite_scores(qwen: kvzip.LLM) -> None:
    weights = weights_of(qwen) if qwen.distill([TEXT, OTHER]) else {}
    for sign in (-1, 1):
        extreme = {name: torch.full_like(value, sign * LARGEST_WEIGHT) for name, value in weights.items()}
        save_surrogate(qwen.fingerprint, extreme, "")
        assert qwen.prefill(OTHER).scores(FAST).isfinite().all()


def test_weights_are_written_whole_or_not_at_all(
    qwen: kvzip.LLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = qwen.distill([TEXT, OTHER]).path
    good, weights = path.read_bytes(), weights_of(qwen)
    monkeypatch.setattr("os.replace", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(FileError, match="No space left"):
        save_surrogate(qwen.fingerprint, weights, "another")
    assert path.read_bytes() == good and list(path.parent.iterdir()) == [path]
    monkeypatch.undo()
    monkeypatch.setenv("KVZIP_CACHE", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="set KVZIP_CACHE"):
        save_surrogate(qwen.fingerprint, weights, "another")


@pytest.mark.real
def test_a_real_model_foretells_its_scores_of_another_text(
    smollm: kvzip.LLM, articles: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv("KVZIP_CACHE", str(tmp_path))
    texts = [article["text"] for article in sorted(articles, key=lambda a: len(a["text"]))[:3]]
    smollm.distill(texts[:2], "two short articles")
    prefilled = smollm.prefill(texts[2])
    truth, foretold = prefilled.scores(parse_method("kvzip")), prefilled.scores(FAST)
    chance = prefilled.scores(parse_method("random"))
    assert rank_correlation(truth, foretold) > 0.7 > 0.1 > abs(rank_correlation(truth, chance))
    assert kept_overlap(truth, foretold, 0.3) > 0.65 > 0.35 > kept_overlap(truth, chance, 0.3)
    started = time.perf_counter()
    info = smollm.compress(texts[2], 0.3, method="kvzip-fast").data.info
    with capsys.disabled():
        print(f"\nscores on top of the prefill: {info.score_s / info.prefill_s:.3f} of it, with all else ", end="")
        print(f"{(time.perf_counter() - started - info.prefill_s) / info.prefill_s:.3f}")
