"""The transform `refit` in methods: against direct computation, in chunks, in files, beside quantized pairs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model, tiny_tokenizer
from torch import Tensor

import kvzip
from kvzip.backends.reference import ReferenceBackend
from kvzip.chunks import equal_parts
from kvzip.errors import UnknownNameError
from kvzip.methods import parse_method
from kvzip.ops.attention import attend
from kvzip.ops.refit import HELD_OUT, Block, refit, with_mass
from kvzip.ops.rope import shift_keys
from kvzip.replayed import ReplayedQueries
from kvzip.scorers import SCORERS
from kvzip.scorers.base import BaseScorer, Observation, Observer, Shape
from kvzip.transforms.refit import Whole

TEXT = "The quick brown fox jumps over the lazy dog and runs away from 17 angry bees. " * 5


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma2", "gemma3"])
def case(request: pytest.FixtureRequest) -> SimpleNamespace:
    llm = kvzip.wrap(tiny_model(request.param, seed=3), tiny_tokenizer())
    return SimpleNamespace(llm=llm, prefilled=llm.prefill(TEXT))


def made(case: SimpleNamespace, method: str, **options: object) -> kvzip.CompressedContext:
    return case.prefilled.compress(kvzip.CompressOptions(method=method, **options))


def logits(context: kvzip.CompressedContext) -> Tensor:
    ids = torch.tensor([context.llm.question_ids("Who runs away?")])
    with torch.inference_mode():
        return context.llm.model(ids, past_key_values=context.cache()).logits


def queries_of(case: SimpleNamespace, chunk_len: int = 2000) -> ReplayedQueries:
    full = case.prefilled._full
    queries = ReplayedQueries(full._shape)
    full.replay(queries, chunk_len)
    return queries


def test_one_chunk_against_the_direct_computation(case: SimpleNamespace) -> None:
    plain, found = made(case, "kvzip", keep_ratio=0.4).data, made(case, "kvzip+refit", keep_ratio=0.4).data
    assert torch.equal(plain.keep_mask, found.keep_mask)
    full, queries, changed = case.prefilled._full, queries_of(case), 0
    everything = Everything(full._shape)
    full.replay(everything)
    for number, index in enumerate(found.full_layers):
        shown, geometry, layer = queries.of(number), case.llm.geometry.layers[index], found.layers[index]
        keys, values = (t[0] for t in full.cache.layers[index].read(slice(0, full.length)))
        (seen,) = everything.found[number]
        taken_rows = torch.linspace(0, seen.query.shape[1] - 1, shown.query.shape[1]).long()
        lse = all_lses(seen, geometry.softcap)[:, taken_rows]
        torch.testing.assert_close(shown.lse, lse, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(shown.outputs.float(), seen.outputs[:, taken_rows], atol=2e-3, rtol=2e-3)
        groups = len(shown.query) // len(keys)
        held_out = (torch.arange(shown.query.shape[1]) % HELD_OUT == HELD_OUT - 1).repeat(groups)
        for head, kept in enumerate(found.keep_mask[number]):
            rows = torch.cat(list(shown.query[head * groups : (head + 1) * groups].float()))
            raw = rows @ keys[head].T * geometry.scale
            capped = raw if geometry.softcap is None else geometry.softcap * torch.tanh(raw / geometry.softcap)
            heads = slice(head * groups, (head + 1) * groups)
            attention = (capped - lse[heads].flatten().unsqueeze(1)).exp()
            block, own = attention[:, full.prefix_ids.numel() :], values[head, full.prefix_ids.numel() :]
            took = block @ with_mass(own)
            beside = with_mass(shown.outputs[heads].float().flatten(0, 1)) - took
            fitted, judge = (Block(block[part][:, kept], took[part], beside[part]) for part in (~held_out, held_out))
            expected = refit(fitted, judge, own[kept]) if kept.any() else None
            start = layer.offsets[head] + full.prefix_ids.numel()
            pairs = slice(start, layer.offsets[head + 1])
            before = slice(layer.offsets[head], start)
            assert torch.equal(layer.values[before], plain.layers[index].values[before]), "the prefix stays as it is"
            if expected is None:
                assert torch.equal(layer.values[pairs], plain.layers[index].values[pairs])
            else:
                changed += 1
                bias = layer.bias[pairs].float()
                weighted, wanted = (block[:, kept] * w for w in (bias.exp(), expected.weights))
                # single pairs are less sure, near bounds above all, than what they add
                torch.testing.assert_close(bias, expected.weights.log(), atol=5e-2, rtol=2e-2)
                torch.testing.assert_close(weighted.sum(1), wanted.sum(1), atol=1e-3, rtol=1e-3)
                torch.testing.assert_close(
                    weighted @ layer.values[pairs], wanted @ expected.values, atol=1e-3, rtol=1e-3
                )
        assert torch.equal(layer.keys, plain.layers[index].keys)
    assert changed > 0


class Everything(Observer):
    """All that is shown of the replay, by layer."""

    needs = frozenset({"replay_queries"})

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.found: list[list[Observation]] = [[] for _ in range(shape[0])]

    def observe(self, layer: int, observation: Observation) -> None:
        self.found[layer].append(observation)


def all_lses(seen: Observation, softcap: float | None) -> Tensor:
    """[Hq, T]: over prefix, chunk and the replayed tokens up to each, straight from the keys."""
    keys = torch.cat([seen.prefix_keys, seen.chunk_keys, seen.replay_keys], dim=1)
    groups, q_len = len(seen.query) // len(keys), seen.query.shape[1]
    logits = seen.query @ keys.repeat_interleave(groups, dim=0).transpose(1, 2) * seen.scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logits[..., -q_len:].masked_fill_(torch.ones(q_len, q_len, dtype=torch.bool).triu(1), -torch.inf)
    return torch.logsumexp(logits, dim=-1)


def replayed_outputs(case: SimpleNamespace, method: str, keep_ratio: float, chunk_len: int) -> list[Tensor]:
    """What the replay's queries take from the context and from the replayed tokens before them, by layer and chunk.

    The context by the slow reference; the replayed tokens by taking prefix and chunk from what was observed.
    """
    full, backend = case.prefilled._full, ReferenceBackend()
    everything = Everything(full._shape)
    full.replay(everything, chunk_len)
    data = made(case, method, keep_ratio=keep_ratio, chunk_len=chunk_len).data
    outputs = []
    for observations, index in zip(everything.found, data.full_layers, strict=True):
        geometry = case.llm.geometry.layers[index]
        for seen in observations:
            query, how = seen.query[None], {"scale": geometry.scale, "softcap": geometry.softcap}
            near_keys = torch.cat([seen.prefix_keys, seen.chunk_keys], dim=1)[None]
            prefix_values = full.cache.layers[index].read(slice(0, full.prefix_ids.numel()))[1]
            near, near_lse = attend(query, near_keys, torch.cat([prefix_values, seen.chunk_values[None]], dim=2), **how)
            replayed = seen.outputs - (near_lse - seen.lse).exp()[0].unsqueeze(-1) * near[0]
            share = 1 - (near_lse - seen.lse).exp()[0]
            shifted = shift_keys(query, geometry.inv_freq, -full.length)  # as the keys of a packed layer are
            own, own_lse = backend.attend_ragged(shifted, data.layers[index], **how)
            weight = (own_lse - seen.lse).exp()[0]
            outputs.append((weight.unsqueeze(-1) * own[0] + replayed) / (weight + share).unsqueeze(-1))
    return outputs


@pytest.mark.parametrize(("chunk_len", "limit"), [(2000, 0.9), (100, 1.0)])
def test_it_is_nearer_to_what_the_full_cache_puts_out(case: SimpleNamespace, chunk_len: int, limit: float) -> None:
    """Random weights have little that could be made up for; what real models gain: tests/test_real_methods.py."""
    full, plain, found = (
        replayed_outputs(case, method, ratio, chunk_len)
        for method, ratio in (("kvzip", 1.0), ("kvzip", 0.4), ("kvzip+refit", 0.4))
    )
    before, after = (
        sum(float((a - b).square().sum()) for a, b in zip(outputs, full, strict=True)) for outputs in (plain, found)
    )
    assert 0 < after < limit * before


def test_all_kept_is_the_full_cache_without_a_bias(case: SimpleNamespace) -> None:
    context = made(case, "kvzip+refit", keep_ratio=1.0)
    assert all(layer.bias is None for layer in context.data.layers)
    assert torch.equal(logits(context), logits(made(case, "kvzip", keep_ratio=1.0)))


def test_queries_take_as_much_as_the_cache_and_stand_in_chunks(case: SimpleNamespace) -> None:
    full = case.prefilled._full
    queries = queries_of(case, chunk_len=60)
    total = full.context_ids.numel()
    for number in range(full._shape[0]):
        shown = queries.of(number)
        rows = shown.query.shape[1] * len(shown.query) // full._shape[1]
        assert 2 * total <= rows <= 2 * total + len(shown.query) * len(shown.blocks)
        assert shown.query.dtype == torch.float16, "as wide as the cache, half as deep"
        assert [(c.start, c.stop) for c in shown.blocks][-1][1] == total and len(shown.blocks) > 2
        assert shown.block_of.unique().tolist() == list(range(len(shown.blocks)))


def test_it_makes_no_difference_when_queries_are_taken(case: SimpleNamespace) -> None:
    """With the scores, or by a replay of their own where these were known already."""
    whole = made(case, "kvzip+refit", keep_ratio=0.4)
    other = case.llm.prefill(TEXT)
    other.scores(parse_method("kvzip"))
    later = other.compress(kvzip.CompressOptions(keep_ratio=0.4, method="kvzip+refit"))
    at_once = case.llm.compress(TEXT, 0.4, method="kvzip+refit")
    for context in (later, at_once):
        torch.testing.assert_close(logits(context), logits(whole), atol=1e-4, rtol=1e-4)


def test_an_interrupted_replay_is_not_taken_for_a_whole_one(case: SimpleNamespace) -> None:
    whole, other = made(case, "kvzip+refit", keep_ratio=0.4, chunk_len=60), case.llm.prefill(TEXT)
    options = kvzip.CompressOptions(keep_ratio=0.4, method="kvzip+refit", chunk_len=60)
    for scored in (False, True):  # interrupted while scoring, and while replaying for the fit alone
        if scored:
            other.scores(parse_method("kvzip"), 60)

        def stop(_: str, done: float, total: float | None) -> None:
            if total and done > total / 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            other.compress(options, progress=stop)
    torch.testing.assert_close(logits(other.compress(options)), logits(whole), atol=1e-4, rtol=1e-4)


class KeysToo(BaseScorer):
    """Needs the replay and the keys; scores by the norms of the keys alone."""

    needs = frozenset({"replay_queries", "keys"})

    def read(self, layer: int, keys: Tensor, values: Tensor) -> None:
        self._scores[layer] = keys.float().norm(dim=-1)


def test_a_scorer_beside_the_queries_is_shown_keys_too(case: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCORERS, "keys-too", f"{__name__}:KeysToo")
    full = case.prefilled._full
    alone, beside = full.score("keys-too"), full.score("keys-too", queries=ReplayedQueries(full._shape))
    assert torch.equal(alone, beside) and alone.min() > 0


def test_other_scorers_have_the_text_replayed_for_it(case: SimpleNamespace) -> None:
    context = made(case, "l2-norm+refit", keep_ratio=0.4)
    assert any(layer.bias is not None for layer in context.data.layers)


@pytest.mark.parametrize(
    "method",
    ["kvzip+refit", "kvzip+refit+int4:group_size=8", "kvzip+refit+k8v4", "kvzip+refit+int4:key_bits=3,channels=mixed"],
)
def test_saved_and_opened_and_in_bytes(case: SimpleNamespace, method: str, tmp_path: Path) -> None:
    context = made(case, method, keep_ratio=0.5)
    assert any(layer.bias is not None for layer in context.data.layers)
    context.save(tmp_path / "a.kvz")
    assert torch.equal(logits(case.llm.open(tmp_path / "a.kvz")), logits(context))
    most = context.data.kv_nbytes
    within = made(case, method, budget=f"{most}B").data
    assert most - 4096 < within.kv_nbytes <= most


def test_pursued_keys_are_as_many_of_each_head_and_packed_as_chosen(case: SimpleNamespace, tmp_path: Path) -> None:
    scored, found = (made(case, f"kvzip+refit{keys}", keep_ratio=0.2) for keys in ("", ":keys=pursued"))
    assert found.data.pairs_per_head == scored.data.pairs_per_head
    assert not torch.equal(found.data.keep_mask, scored.data.keep_mask)
    full = case.prefilled._full
    for number, index in enumerate(found.data.full_layers):
        keys = full.cache.layers[index].read(slice(0, full.length))[0][0]
        mask = full._with_prefix(found.data.keep_mask[number])
        assert torch.equal(found.data.layers[index].keys, shift_keys(keys[mask], full._inv_freq(index), -full.length))
    found.save(tmp_path / "a.kvz")
    assert torch.equal(logits(case.llm.open(tmp_path / "a.kvz")), logits(found))


def test_pursued_keys_are_those_of_the_pursuit_where_held_out_queries_fare_better(
    case: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was compared is what is taken: of each block of a head, the better of both."""
    compared = list[tuple[Whole, Tensor]]()
    pursued = kvzip.transforms.refit._pursued

    def watched(batch: list[Whole]) -> Iterator[Tensor]:
        for whole, taken in zip(batch, pursued(batch), strict=True):
            assert taken.sum() == whole.kept.sum()
            compared.append((whole, taken if whole.loss(taken) < whole.loss(whole.kept) else whole.kept))
            yield taken

    monkeypatch.setattr(kvzip.transforms.refit, "_pursued", watched)
    found = made(case, "kvzip+refit:keys=pursued", keep_ratio=0.2).data
    rows = [row for row in found.keep_mask.flatten(0, 1) if row.any() and not row.all()]
    for row, (whole, wanted) in zip(rows, compared, strict=True):
        assert set((row.nonzero().squeeze(1) + found.prefix_len).tolist()) == set(whole.places[wanted].tolist())
        assert int(whole.kept.sum()) == int(row.sum()) and len(whole.kept) <= 2 * int(row.sum())
    assert any(wanted is not whole.kept for whole, wanted in compared)


def test_where_more_pairs_stay_there_is_no_pursuit(case: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    scored = made(case, "kvzip+refit", keep_ratio=0.2).data.keep_mask.flatten(0, 1)
    shares = scored.float().mean(dim=1)
    most = float(shares.median())
    monkeypatch.setattr(kvzip.transforms.refit, "MOST", most)
    found = made(case, "kvzip+refit:keys=pursued", keep_ratio=0.2).data.keep_mask.flatten(0, 1)
    is_changed = (found != scored).any(dim=1)
    assert is_changed[shares <= most].any() and not is_changed[shares > most].any()


def test_it_needs_something_that_evicts() -> None:
    with pytest.raises(UnknownNameError, match="has no scorer"):
        parse_method("refit+int4")
    assert parse_method("kvzip+int4+refit").composition == "reconstruction+global+refit+quantize"


@given(st.integers(0, 50), st.integers(1, 5000), st.integers(1, 1500))
def test_equal_parts_are_consecutive_and_small_enough(start: int, total: int, most: int) -> None:
    parts = equal_parts(slice(start, start + total), most)
    lengths = [part.stop - part.start for part in parts]
    assert parts[0].start == start and parts[-1].stop == start + total
    assert all(a.stop == b.start for a, b in pairwise(parts))
    assert min(lengths) >= 1 and max(lengths) <= most and max(lengths) - min(lengths) <= 1
    assert len(parts) == -(-total // most)


def test_long_chunks_are_fitted_in_blocks_by_what_repeats_them(
    case: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvzip.replayed, "BLOCK_LEN", 100)
    shown = queries_of(case).of(0)
    assert len(shown.blocks) == -(-case.prefilled._full.context_ids.numel() // 100) > 1
    counts = shown.block_of.bincount()
    assert (shown.block_of.diff() >= 0).all() and counts.max() - counts.min() <= 1
    assert any(layer.bias is not None for layer in case.llm.compress(TEXT, 0.4, method="kvzip+refit").data.layers)
