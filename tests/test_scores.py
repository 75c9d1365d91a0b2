"""Every scorer against its slow, obvious form, and on made-up attention."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import Reference
from tiny import tiny_model

from kvzip.backends import get_backend
from kvzip.chunks import RepeatPrompts, chunk_slices
from kvzip.compress import Engine, FullContext
from kvzip.hf.geometry import probe
from kvzip.methods import parse_method
from kvzip.ops.rope import shift_keys
from kvzip.ops.selection import PINNED
from kvzip.scorers import get_scorer
from kvzip.scorers.base import Observation, Reading

FAMILIES = ["llama", "qwen2", "gemma3", "gemma2"]
PROMPTS = RepeatPrompts(torch.arange(3, 9), torch.arange(9, 14), torch.arange(14, 18))
CLOSE = {"atol": 1e-4, "rtol": 1e-3}
PREFIX_LEN, CONTEXT_LEN = 7, 150


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_ids(seed: int, length: int) -> torch.Tensor:
    return torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(seed))


# ---- scorers against slow forms


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> SimpleNamespace:
    model = tiny_model(request.param)
    engine = Engine(model, probe(model), get_backend(), PROMPTS)
    prefix, context = random_ids(0, PREFIX_LEN), random_ids(1, CONTEXT_LEN)
    full = FullContext(engine, prefix, context)
    full.prefill(block_len=64)
    geometry = engine.geometry
    layer = geometry.layers[geometry.full_layers[0]]
    about = geometry.full_layers, lambda i: geometry.layers[i].scale, layer.softcap
    with Reference(model) as reference:
        weights = reference.weights(torch.cat([prefix, context]), *about)
    return SimpleNamespace(
        family=request.param, model=model, engine=engine, prefix=prefix, context=context, full=full, about=about,
        weights=torch.stack([weights[i] for i in geometry.full_layers]),
        groups=layer.num_heads // layer.num_kv_heads,
    )  # fmt: skip


def by_group(case: SimpleNamespace, rows: torch.Tensor) -> torch.Tensor:
    """[Lf, Hq, ...] as [Lf, Hkv, G, ...]."""
    return rows.reshape(rows.shape[0], -1, case.groups, *rows.shape[2:])


@pytest.mark.parametrize(("size", "kernel", "pooling"), [(32, 7, "max"), (8, 5, "avg"), (1, 1, "max"), (100, 3, "max")])
def test_window_scores(case: SimpleNamespace, size: int, kernel: int, pooling: str) -> None:
    ours = case.full.score(f"window:window_size={size},kernel_size={kernel},pooling={pooling}")
    looked = by_group(case, case.weights[..., -size:, PREFIX_LEN:]).mean(dim=(2, 3))[..., : CONTEXT_LEN - size]
    around = torch.nn.functional.pad(looked, (kernel // 2, kernel // 2)).unfold(-1, kernel, 1)
    expected = around.amax(-1) if pooling == "max" else around.mean(-1)
    torch.testing.assert_close(ours[..., : CONTEXT_LEN - size], expected, **CLOSE)
    pinned = ours[..., CONTEXT_LEN - size :]
    assert pinned.min() >= PINNED and (pinned.diff(dim=-1) > 0).all()


def test_last_query_scores(case: SimpleNamespace) -> None:
    ours, expected = case.full.score("last-query"), case.weights[:, :, -1, PREFIX_LEN:].mean(dim=1)
    for head in range(ours.shape[1]):
        torch.testing.assert_close(ours[:, head, :-1], expected[:, :-1], **CLOSE)
    assert (ours[..., -1] >= PINNED).all()


@pytest.mark.parametrize("rule", ["code", "paper"])
@pytest.mark.parametrize("num_sinks", [4, PREFIX_LEN + 3])
def test_suffix_loss_scores(case: SimpleNamespace, rule: str, num_sinks: int) -> None:
    ours = case.full.score(f"suffix-loss:rule={rule},num_sinks={num_sinks},whole_layers=1")
    assert (ours[:1] >= PINNED).all()
    first = max(num_sinks, PREFIX_LEN)
    for layer in range(1, len(ours)):
        rows = case.weights[layer, :, -1].double()
        kept_before = [row[:first].square().sum() if rule == "paper" else 0 for row in rows]
        for position in range(first, PREFIX_LEN + CONTEXT_LEN):
            norms = [
                sum((row[start:].square().sum() + before) ** 0.5 for row, before in zip(rows, kept_before, strict=True))
                for start in (first, position + 1)
            ]
            got = ours[layer, :, position - PREFIX_LEN]
            if position < PREFIX_LEN + CONTEXT_LEN - 1:
                torch.testing.assert_close(got, (1 - norms[1] / norms[0]).float().expand(got.shape), **CLOSE)
            else:
                assert (got >= PINNED).all()
        assert (ours[layer, :, : first - PREFIX_LEN] >= PINNED).all()


@pytest.mark.parametrize("size", [5, 64, 999])
def test_mean_attention_scores(case: SimpleNamespace, size: int) -> None:
    ours = case.full.score(f"mean-attention:window_size={size}")
    last = min(size, CONTEXT_LEN)
    mean = case.weights[..., -last:, PREFIX_LEN:].mean(dim=2)  # each query head by itself
    expected = by_group(case, mean).amax(dim=2) * (PREFIX_LEN + CONTEXT_LEN)
    torch.testing.assert_close(ours[..., : CONTEXT_LEN - last], expected[..., : CONTEXT_LEN - last], **CLOSE)
    assert (ours[..., CONTEXT_LEN - last :] >= PINNED).all() and (ours > 0).all()


@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
def test_accumulated_scores(case: SimpleNamespace, reduce: str) -> None:
    ours = case.full.score(f"accumulated:reduce={reduce},num_recent=5")
    received = by_group(case, case.weights[..., PREFIX_LEN:, :])  # by the context's queries
    if reduce == "max":
        expected = received.amax(dim=(2, 3))
    else:
        expected = received.sum(dim=3).mean(dim=2)
        assert torch.allclose(expected.sum(-1), torch.tensor(float(CONTEXT_LEN)), rtol=1e-4)  # each row sums to 1
    expected = expected[..., PREFIX_LEN:]
    if reduce == "mean":
        expected = expected / torch.arange(CONTEXT_LEN, 0, -1)
    torch.testing.assert_close(ours[..., :-5], expected[..., :-5], **CLOSE)
    assert (ours[..., -5:] >= PINNED).all() and ours[..., :-5].max() < PINNED


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_reconstruction_plus_scores(case: SimpleNamespace, power: float) -> None:
    ours = case.full.score(f"reconstruction-plus:power={power}", 40)
    with Reference(case.model) as reference:
        replays = list(case.full._replays(chunk_slices(CONTEXT_LEN, 40)))
        expected = reference.plus_scores(case.prefix, case.context, replays, *case.about, power=power)
    torch.testing.assert_close(ours, expected, **CLOSE)
    assert not torch.allclose(ours, case.full.score("reconstruction", 40), rtol=0.1)


@pytest.mark.parametrize("epsilon", [0, 0.02])
def test_expected_scores(case: SimpleNamespace, epsilon: float) -> None:
    ours = case.full.score(f"expected:epsilon={epsilon},num_future=20")
    queries = unrotated_queries(case)
    for index, layer in enumerate(case.about[0]):
        geometry = case.engine.geometry.layers[layer]
        query = queries[layer][:, PREFIX_LEN:].double()  # the first four tokens are in the prefix
        mean = query.mean(dim=1)
        centred = query - mean.unsqueeze(1)
        covariance = centred.transpose(1, 2) @ centred / CONTEXT_LEN
        rotations = [rotation(geometry, PREFIX_LEN + CONTEXT_LEN + t) for t in range(20)]
        average = torch.stack(rotations).mean(dim=0)
        mean, covariance = mean @ average.T, average @ covariance @ average.T
        keys, values = (t[0].double() for t in case.full.cache.layers[layer].read(slice(PREFIX_LEN, None)))
        shares = []
        for head in range(geometry.num_heads):
            own = keys[head // case.groups]
            quadratic = torch.stack([k @ covariance[head] @ k for k in own])
            z = own @ mean[head] * geometry.scale + quadratic * geometry.scale**2 / 2
            shares.append(torch.softmax(z, dim=-1))
        share = torch.stack(shares).reshape(keys.shape[0], case.groups, -1).mean(dim=1)
        expected = (share + epsilon) * values.norm(dim=-1)
        torch.testing.assert_close(ours[index], expected.float(), **CLOSE)


def unrotated_queries(case: SimpleNamespace) -> dict[int, torch.Tensor]:
    """[Hq, T, D] a layer, from the projections themselves: what q_proj, or q_norm behind it, puts out."""
    seen, handles = {}, []
    for module in case.model.modules():
        if hasattr(module, "q_proj"):
            last = getattr(module, "q_norm", module.q_proj)
            keep = lambda _, __, out, m=module: seen.update({m.layer_idx: (out, m.head_dim)})  # noqa: E731
            handles.append(last.register_forward_hook(keep))
    with Reference(case.model), torch.inference_mode():
        case.model(torch.cat([case.prefix, case.context])[None])
    for handle in handles:
        handle.remove()
    return {
        layer: (out if out.dim() == 4 and out.shape[1] != PREFIX_LEN + CONTEXT_LEN else split_heads(out, size))[0]
        for layer, (out, size) in seen.items()
    }


def split_heads(out: torch.Tensor, head_dim: int) -> torch.Tensor:
    return out.reshape(1, out.shape[1], -1, head_dim).transpose(1, 2)


def rotation(geometry, position: int) -> torch.Tensor:
    """The matrix [D, D] that a rotary embedding is at that position."""
    half = len(geometry.inv_freq)
    matrix = torch.zeros(geometry.head_dim, geometry.head_dim, dtype=torch.float64)
    for i, frequency in enumerate(geometry.inv_freq.tolist()):
        angle = torch.tensor(position * frequency, dtype=torch.float64)
        matrix[i, i] = matrix[i + half, i + half] = angle.cos()
        matrix[i, i + half], matrix[i + half, i] = -angle.sin(), angle.sin()
    return matrix


WATCHING = [
    "window:window_size=70",
    "last-query",
    "accumulated",
    "accumulated:reduce=max",
    "accumulated:reduce=mean",
    "expected",
]


@pytest.mark.parametrize("name", WATCHING)
def test_watching_and_reading_again_see_the_same(case: SimpleNamespace, name: str) -> None:
    before = [(layer.keys.clone(), layer.values.clone(), layer.length) for layer in case.full.cache.layers]
    again = case.full.score(name)
    for layer, (keys, values, length) in zip(case.full.cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values) and layer.length == length
    for block_len in (1000, 64, 11):
        full = FullContext(case.engine, case.prefix, case.context)
        full.prefill(block_len, scorer_name=name)
        full.read_again = lambda *args, **kwargs: pytest.fail("read again")
        torch.testing.assert_close(full.score(name), again, **CLOSE)


def test_an_interrupted_second_reading_leaves_the_cache_as_it_was(case: SimpleNamespace) -> None:
    class Stop(Exception):
        pass

    def stop(*args: object) -> None:
        raise Stop

    before = case.full.score("accumulated")
    scorer = case.full.make_scorer("accumulated")
    scorer.watch = stop
    with pytest.raises(Stop):
        case.full.read_again(scorer)
    assert case.full.cache.length == PREFIX_LEN + CONTEXT_LEN
    torch.testing.assert_close(case.full.score("accumulated"), before)


# ---- scorers on made-up attention


def reading(query: torch.Tensor, keys: torch.Tensor, prefix_len: int, scale: float = 1.0) -> Reading:
    groups, num_keys, num_queries = query.shape[0] // keys.shape[0], keys.shape[1], query.shape[1]
    logits = query @ keys.repeat_interleave(groups, 0).transpose(1, 2) * scale
    past = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
    lse = torch.logsumexp(logits.masked_fill(~past, -torch.inf), dim=-1)
    inv_freq = 1.0 / 100 ** (torch.arange(0, keys.shape[2], 2) / keys.shape[2])
    return Reading(query, keys, lse, prefix_len, scale, None, inv_freq)


@pytest.mark.parametrize("pooling", ["max", "avg"])
def test_even_attention_has_even_window_scores_away_from_the_edges(pooling: str) -> None:
    scorer = get_scorer(f"window:window_size=1,kernel_size=5,pooling={pooling}", 1, 2, 40)
    scorer.watch(0, reading(torch.zeros(4, 1, 8), random(0, 2, 43, 8), 3))
    torch.testing.assert_close(scorer.scores()[0, :, 2:37], torch.full((2, 35), 1 / 43))


def test_identical_queries_have_no_covariance_and_one_rotation_is_exact() -> None:
    """With one future position n the score is the softmax of k . R_n q, q the query before rotation."""
    length, keys, values = 30, random(1, 1, 30, 8), random(2, 1, 30, 8)
    scorer = get_scorer("expected:num_future=1,num_sinks=0", 1, 1, length)
    about = reading(torch.zeros(1, length, 8), keys, 0, 0.4)
    turned = torch.cat([shift_keys(random(3, 1, 8), about.inv_freq, position) for position in range(length + 1)])
    scorer.watch(0, reading(turned[None, :length], keys, 0, 0.4))
    scorer.read(0, keys, values)
    expected = torch.softmax(keys[0] @ turned[length] * 0.4, dim=0) * values[0].norm(dim=-1)
    torch.testing.assert_close(scorer.scores()[0, 0], expected, **CLOSE)
    scorer.read(0, keys, 3 * values)
    torch.testing.assert_close(scorer.scores()[0, 0], 3 * expected, **CLOSE)


def test_gaussian_queries_pay_the_expected_attention() -> None:
    """The mean of exp(q . k scale) over many queries is exp(z), up to sampling."""
    length, keys, values = 20_000, 0.5 * random(1, 1, 20_000, 8), torch.ones(1, 20_000, 8)
    scorer = get_scorer("expected:num_future=1,num_sinks=0", 1, 1, length)
    plain = 0.3 + random(4, 1, length, 8)
    inv_freq = reading(plain[:, :1], keys, 0).inv_freq
    turned = torch.stack([shift_keys(plain[:, t], inv_freq, t) for t in range(length)], dim=1)
    scorer.watch(0, Reading(turned, keys, torch.zeros(1, length), 0, 0.5, None, inv_freq))
    scorer.read(0, keys, values)
    future = shift_keys(plain[0], inv_freq, length)
    sampled = torch.stack([torch.exp(future @ key * 0.5).mean() for key in keys[0, :50]])
    ours = scorer.scores()[0, 0, :50]
    torch.testing.assert_close(ours / ours.sum(), sampled / sampled.sum(), atol=0, rtol=0.03)


def test_power_nought_is_kvzip_and_a_half_lies_between(case: SimpleNamespace) -> None:
    """With one query head and one row a pair's score would be the geometric mean; maxima of several lie above it."""
    plain, half, plus = (
        case.full.score(name, 40)
        for name in ("reconstruction", "reconstruction-plus:power=0.5", "reconstruction-plus:power=1")
    )
    torch.testing.assert_close(case.full.score("reconstruction-plus:power=0", 40), plain)
    assert bool((half <= (plain * plus).sqrt() * (1 + 1e-4)).all()), "Cauchy and Schwarz: no row gives more"
    assert not torch.allclose(half, plain) and not torch.allclose(half, plus)


def test_unit_norms_make_kvzip_plus_kvzip() -> None:
    query, chunk, replayed = random(0, 4, 6, 8), random(1, 2, 10, 8), random(2, 2, 6, 8)
    values = torch.nn.functional.normalize(random(3, 2, 10, 8), dim=-1)
    logits = query @ torch.cat([chunk, replayed], 1).repeat_interleave(2, 0).transpose(1, 2)
    seen = Observation(
        query=query, prefix_keys=chunk[:, :0], chunk_keys=chunk, replay_keys=replayed,
        lse=torch.logsumexp(logits, -1), outputs=torch.zeros(4, 6, 8), scale=1.0, softcap=None, chunk=slice(0, 10), chunk_values=values,
        input_norms=torch.ones(6), output_weights=torch.eye(8).expand(4, 8, 8),
    )  # fmt: skip
    plus, plain = get_scorer("reconstruction-plus", 1, 2, 10), get_scorer("reconstruction", 1, 2, 10)
    for scorer in (plus, plain):
        scorer.observe(0, seen)
    torch.testing.assert_close(plus.scores(), plain.scores())


def last_row(weights: list[list[float]], prefix_len: int = 1) -> Reading:
    """A last token that pays these weights, a list for each query head, each summing up to 1; one KV head."""
    keys = torch.eye(len(weights[0]))[None]
    query = torch.tensor(weights).log().clamp_min(-200)[:, None]  # exp(-200) is 0
    return Reading(query, keys, torch.zeros(len(weights), 1), prefix_len, 1.0, None, None)


def refreekv(options: str, about: Reading) -> list[bool]:
    """What is kept of the context in a layer that is not kept whole."""
    method = parse_method(f"refreekv:whole_layers=0,{options}")
    scorer = get_scorer(str(method.scorer), 1, 1, about.keys.shape[1] - about.prefix_len)
    scorer.watch(0, about)
    return method.budget_kind(scorer.scores(), None, dict(method.budget.options))[0, 0].tolist()


def test_refreekv_by_hand() -> None:
    """Two query heads behind a prefix of one token. Norms of the context: 5 and 13 parts of 100; of the last two
    pairs: 3 and 5. Without the first pair the mean norm falls from 9 to 4, by 5/9."""
    about = last_row([[0.93, 0.04, 0.0, 0.03], [0.83, 0.12, 0.0, 0.05]])
    assert refreekv("num_sinks=1,threshold=0.55", about) == [True, True, True]
    assert refreekv("num_sinks=1,threshold=0.56", about) == [False, False, True]


def test_refreekv_at_its_ends() -> None:
    some = last_row([[0.5, 0.1, 0.0, 0.1, 0.2, 0.1]])
    assert refreekv("num_sinks=1,threshold=0", some) == [True] * 5
    assert refreekv("num_sinks=1,threshold=0", last_row([[0.5, 0.0, 0.0, 0.2, 0.2, 0.1]])) == [False] * 2 + [True] * 3
    assert refreekv("num_sinks=1,threshold=1", some) == [False] * 4 + [True], "the last token"
    assert refreekv("num_sinks=3,threshold=1", some) == [True] * 2 + [False] * 2 + [True], "sinks and the last token"
    only = last_row([[0.0, 0.0, 1.0, 0.0, 0.0, 0.0]])
    assert refreekv("num_sinks=2,threshold=0.99", only) == [True] * 5, "all attention on the first that is no sink"
    assert refreekv("num_sinks=2", last_row([[1.0, 0.0, 0.0, 0.0, 0.0, 0.0]])) == [True] + [False] * 3 + [True]


def test_sinks_in_the_norm_let_nearly_everything_go() -> None:
    """1,000 tokens, 60% of the attention on 4 sinks and the rest flat: the toy of the specification."""
    about = last_row([[0.15] * 4 + [0.4 / 996] * 996], prefix_len=4)
    assert sum(refreekv("rule=paper", about)) == 1
    assert sum(refreekv("rule=code", about)) == 977


@given(st.integers(0, 2**16), st.sampled_from(["code", "paper"]))
def test_refreekv_keeps_sinks_and_a_suffix_and_never_more_at_a_higher_threshold(seed: int, rule: str) -> None:
    about = last_row(torch.softmax(2 * random(seed, 3, 40), dim=-1).tolist(), prefix_len=2)
    counts = []
    for threshold in (0, 0.01, 0.1, 0.5, 1):
        kept = refreekv(f"rule={rule},threshold={threshold}", about)
        assert kept[:2] == [True, True], "4 sinks, 2 of them in the prefix"
        cut = kept.index(True, 2)
        assert all(kept[cut:]) and not any(kept[2:cut])
        counts.append(sum(kept))
    assert counts == sorted(counts, reverse=True)


@given(st.integers(0, 2**16), st.floats(0.01, 100))
def test_scaling_all_keys_keeps_the_order_of_their_norms(seed: int, factor: float) -> None:
    keys = random(seed, 2, 30, 8).double()
    first, second = get_scorer("key-norm", 1, 2, 30), get_scorer("key-norm", 1, 2, 30)
    first.read(0, keys, keys)
    second.read(0, keys * factor, keys)
    torch.testing.assert_close(second.scores(), first.scores() * factor, atol=1e-6, rtol=1e-5)
