"""The portable layout on tiny models: what an engine reads from it, what is refused, and its file under damage."""

from __future__ import annotations

import json
import random
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import call
from engine import engine_logits, greedy, same_pairs, session_logits
from stored import digest_by_the_page, forge, leftovers, parts_of
from tiny import llama, tiny_model, tiny_tokenizer
from torch import Tensor

import kvzip
from kvzip import store
from kvzip.compress import FullContext
from kvzip.export import make_portable
from kvzip.portable import PortableContext, PortableLayer, uniform_mask
from kvzip.store import portable

TEXT = "The lamp was lit in May. It burned all night, and no ship was lost; the keeper slept at dawn.\n" * 10
NOISE = {"atol": 2e-3, "rtol": 1e-3}  # as in test_families
ASKED = torch.randint(3, 300, (30,), generator=torch.Generator().manual_seed(3))
JSON_KEYS = {
    "path", "file_nbytes", "num_pairs", "prefix_len", "logical_len", "kv_nbytes", "full_kv_nbytes", "model", "method",
    "dtype", "keep_ratio_asked", "keep_ratio", "loss", "prefill_s", "total_s", "sha256", "origin",
}  # fmt: skip


@pytest.fixture(scope="module", params=["llama", "llama3.1", "phi3", "gemma2", "gemma3"])
def case(request: pytest.FixtureRequest) -> SimpleNamespace:
    """A model with a text, read once and compressed with counts of their own for all heads."""
    llm = kvzip.wrap(tiny_model(request.param), tiny_tokenizer())
    prefilled = llm.prefill(TEXT)
    return SimpleNamespace(llm=llm, prefilled=prefilled, context=prefilled.compress(0.4))


@pytest.fixture(scope="module")
def small() -> SimpleNamespace:
    """A model of two layers with a short text."""
    llm = kvzip.wrap(llama(2), tiny_tokenizer())
    return SimpleNamespace(llm=llm, prefilled=llm.prefill(TEXT[:188]))


@pytest.fixture
def written(case: SimpleNamespace, tmp_path: Path) -> tuple[Path, PortableContext]:
    path = tmp_path / "doc.kvp.safetensors"
    context = make_portable(case.llm, case.context.data)
    portable.write(path, context)
    return path, context


def tensors_of(context: PortableContext) -> list[Tensor]:
    return [tensor for layer in context.layers for tensor in (layer.keys, layer.values)]


def assert_close(a: PortableContext, b: PortableContext) -> None:
    for x, y in zip(tensors_of(a), tensors_of(b), strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


def never_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FullContext, "prefill", lambda *args, **kwargs: pytest.fail("the text was read again"))


# ---- what an engine gets


def test_a_stock_cache_answers_as_the_same_pairs_do(case: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "doc.kvp.safetensors"
    info = case.context.export(path, 0.5)
    context, data = portable.read(path), same_pairs(case.prefilled, case.context.data, 0.5)
    assert {n for i in data.full_layers for n in data.pairs_per_head[i]} == {info.num_pairs} == {context.num_pairs}
    expected = session_logits(case.llm, data, ASKED)
    torch.testing.assert_close(engine_logits(case.llm, context, ASKED), expected, **NOISE)
    shifted_wrong = engine_logits(case.llm, context, ASKED, -info.num_pairs)  # by N in all
    assert (shifted_wrong - expected).abs().max() > 0.1, "the rotation must matter"
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    own = case.llm.model.generate(
        ASKED[None], past_key_values=kvzip.CompressedContext(case.llm, data).cache(), **options
    )
    assert greedy(case.llm, context, ASKED, 12) == own[0, len(ASKED) :].tolist()


def test_a_full_text_is_exact_too(case: SimpleNamespace) -> None:
    context = make_portable(case.llm, case.prefilled.compress(1.0).data)
    assert context.num_pairs == context.logical_len
    expected = session_logits(case.llm, case.prefilled.compress(1.0).data, ASKED)
    torch.testing.assert_close(engine_logits(case.llm, context, ASKED), expected, **NOISE)


def test_each_head_keeps_its_best_by_rank(case: SimpleNamespace) -> None:
    data = case.context.data
    for count in (3, 200, data.context_len - 1):
        mask = uniform_mask(data, count)
        for kept, held, ranks in zip(*(t.flatten(0, 1) for t in (mask, data.keep_mask, data.ranks)), strict=True):
            order = sorted(range(len(ranks)), key=lambda i: (-int(held[i]), -int(ranks[i]), i))
            assert kept.nonzero().flatten().tolist() == sorted(order[:count])


def test_ranks_choose_what_the_scores_of_a_uniform_budget_choose(case: SimpleNamespace) -> None:
    uniform = case.prefilled.compress(kvzip.CompressOptions(keep_ratio=0.5, method="kvzip+uniform")).data
    count = int(uniform.keep_mask.sum(-1).min())
    same = uniform_mask(case.context.data, count) & uniform.keep_mask
    assert same.sum() > 0.97 * uniform.keep_mask.sum()


def test_slots_outside_a_window_are_zeros(case: SimpleNamespace) -> None:
    context = make_portable(case.llm, case.context.data, 0.5)
    total, indices = context.num_pairs, range(len(context.layers))
    for index in indices:
        whole = context.slots(index, 0, total)
        seen = len(context.layers[index].keys)
        for part, stored in zip(whole, (context.layers[index].keys, context.layers[index].values), strict=True):
            assert len(part) == total and not part[: total - seen].any() and part[total - seen :].equal(stored)
        for start, stop in ((0, 0), (5, 9), (total - 25, total - 20), (total - 24, total), (total - 3, total - 1)):
            for part, both in zip(context.slots(index, start, stop), whole, strict=True):
                assert part.equal(both[start:stop])
        assert context.slots(index, total - 3, total)[0].data_ptr() == context.layers[index].keys[-3:].data_ptr()


# ---- what is read again, and the loss


def test_one_count_is_converted_without_reading(small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    context = small.prefilled.compress(kvzip.CompressOptions(keep_ratio=0.5, method="kvzip+uniform"))
    biased = tuple(replace(x, bias=torch.zeros(len(x.keys))) for x in context.data.layers)  # which has no room
    read_again = make_portable(small.llm, replace(context.data, layers=biased))
    assert read_again.info.prefill_s > 0
    never_reads(monkeypatch)
    converted = make_portable(small.llm, context.data)
    assert_close(converted, read_again)
    assert converted.info.loss == context.data.info.loss == converted.origin.loss
    assert converted.info.keep_ratio == 0.5 and converted.info.prefill_s == 0


def test_fewer_pairs_are_cut_from_the_file_unless_the_loss_is_measured(
    small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = small.prefilled.compress(kvzip.CompressOptions(keep_ratio=0.7, method="kvzip+uniform")).data
    read_again = make_portable(small.llm, data, 0.4)
    never_reads(monkeypatch)
    converted = make_portable(small.llm, data, 0.4, certify=False)
    assert_close(converted, read_again)
    assert converted.info.loss is None and converted.origin.loss == data.info.loss


def test_the_loss_of_the_same_count_is_measured(case: SimpleNamespace) -> None:
    context = make_portable(case.llm, case.context.data)
    expected = case.prefilled._certifier.certify(same_pairs(case.prefilled, case.context.data))
    assert expected is not None and context.info.loss is not None
    assert context.info.loss["kl"] == pytest.approx(expected["kl"], rel=1e-3)
    assert context.info.loss["kl"] > 0 and context.origin.loss == case.context.data.info.loss
    assert context.info.prefill_s > 0
    assert make_portable(case.llm, case.context.data, certify=False).info.loss is None


@pytest.mark.parametrize(
    ("method", "left_out"),
    [
        ("kvzip+refit", ("biases",)),
        ("kvzip+int4", ("codes",)),
        ("clusterkv:skip_first=0", ("clusters",)),
        ("leankv", ("codes",)),
    ],
)
def test_what_has_no_room_is_left_out_and_named(
    small: SimpleNamespace, method: str, left_out: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVZIP_CACHE", str(tmp_path))
    ratio = None if method.startswith(("leankv", "clusterkv")) else 0.5
    data = small.prefilled.compress(kvzip.CompressOptions(keep_ratio=ratio, method=method)).data
    context = make_portable(small.llm, data)
    assert context.origin.left_out == left_out
    expected = session_logits(small.llm, same_pairs(small.prefilled, data), ASKED)
    torch.testing.assert_close(engine_logits(small.llm, context, ASKED), expected, **NOISE)


# ---- refusals


def test_a_choice_without_ranks_is_refused(small: SimpleNamespace) -> None:
    data = replace(small.prefilled.compress(0.5).data, ranks=None)
    with pytest.raises(kvzip.InputError, match=r"no ranks .* kvzip\+uniform"):
        make_portable(small.llm, data)


def test_shared_layers_are_refused(small: SimpleNamespace) -> None:
    data = small.prefilled.compress(0.5).data
    shared = replace(data, layers=(data.layers[0],) * 2)
    with pytest.raises(kvzip.InputError, match="share pairs"):
        make_portable(small.llm, shared)


@pytest.mark.parametrize("keep_ratio", [0, -1.0, 1.5, float("nan"), 0.001])
def test_an_impossible_keep_ratio_is_refused(small: SimpleNamespace, keep_ratio: float) -> None:
    with pytest.raises(kvzip.BudgetError, match="keep ratio"):
        make_portable(small.llm, small.prefilled.compress(0.5).data, keep_ratio)


@pytest.mark.parametrize("length", [188, 10])
def test_fewer_slots_than_a_window_sees_are_refused_with_the_least_ratio(length: int) -> None:
    """At the ratio that the refusal names it works and is exact, a little below it does not."""
    llm = kvzip.wrap(tiny_model("gemma3"), tiny_tokenizer(chat_template=None))
    prefilled = llm.prefill(TEXT[:length])
    data = prefilled.compress(0.5).data
    with pytest.raises(kvzip.BudgetError, match="sliding windows see") as caught:
        make_portable(llm, data, 0.1)
    least = float(re.search(r"keep ratio of ([\d.]+) or more", str(caught.value))[1])
    context = make_portable(llm, data, least)
    assert context.num_pairs == min(23, context.logical_len)
    expected = session_logits(llm, same_pairs(prefilled, data, least), ASKED)
    torch.testing.assert_close(engine_logits(llm, context, ASKED), expected, **NOISE)
    with pytest.raises(kvzip.BudgetError):
        make_portable(llm, data, least - 1.01 / length)


# ---- the file


def assert_refused(path: Path, words: str = "", *, verify: bool = True) -> None:
    with pytest.raises(kvzip.FormatError) as caught:
        portable.read(path, verify=verify)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and words in message
    assert "kvzip export --portable" in message or "upgrade kvzip" in message


def test_what_is_written_is_read(written: tuple[Path, PortableContext]) -> None:
    path, context = written
    for verify in (True, False):
        found = portable.read(path, verify=verify)
        assert all(
            a.equal(b) and a.dtype == b.dtype for a, b in zip(tensors_of(found), tensors_of(context), strict=True)
        )
        assert (found.info, found.origin, found.prefix_len, found.logical_len) == (
            context.info, context.origin, context.prefix_len, context.logical_len,
        )  # fmt: skip
        assert [layer.window for layer in found.layers] == [layer.window for layer in context.layers]
    before = path.read_bytes()
    portable.write(path, context)
    assert path.read_bytes() == before and not leftovers(path.parent)


def test_the_header_says_what_the_tensors_are(written: tuple[Path, PortableContext]) -> None:
    path, context = written
    info, (metadata, tensors) = portable.read_info(path), parts_of(path)
    assert (info.num_pairs, info.prefix_len, info.logical_len) == (
        context.num_pairs, context.prefix_len, context.logical_len,
    )  # fmt: skip
    assert info.heads == tuple((layer.keys.shape[1], layer.keys.shape[2]) for layer in context.layers)
    assert info.kv_nbytes == context.kv_nbytes == sum(t.nbytes for t in tensors.values())
    assert info.dtype == torch.float32 and info.info == context.info and info.origin == context.origin
    assert info.sha256 == metadata["sha256"] == digest_by_the_page(metadata, tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_coarse_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    llm = kvzip.wrap(tiny_model("llama").to(dtype), tiny_tokenizer())
    exact = kvzip.wrap(llm.model, llm.tokenizer)
    info = llm.compress(TEXT[:188], 0.5, certify=False).export(tmp_path / "doc", certify=False)
    assert info.dtype == dtype and portable.read(tmp_path / "doc").layers[0].keys.dtype == dtype
    assert exact.fingerprint == info.info.fingerprint


def test_cut_anywhere(written: tuple[Path, PortableContext]) -> None:
    path, _ = written
    content = path.read_bytes()
    step = len(content) // 60
    for length in (*range(40), *range(0, len(content), step), *range(len(content) - 40, len(content))):
        path.write_bytes(content[:length])
        assert_refused(path, verify=bool(length % 2))
    path.write_bytes(content + b"\0")
    assert_refused(path)


def test_flipped_bits_anywhere(written: tuple[Path, PortableContext]) -> None:
    path, context = written
    content, rng = path.read_bytes(), random.Random(0)
    header_len = int.from_bytes(content[:8], "little")
    for round_ in range(200):
        damaged = bytearray(content)
        damaged[rng.randrange(8 + header_len if round_ % 2 else len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with suppress(kvzip.FormatError):
            found = portable.read(path)  # only where a space of the header became another one
            assert (found.info, found.origin, found.logical_len) == (context.info, context.origin, context.logical_len)
            assert all(a.equal(b) for a, b in zip(tensors_of(found), tensors_of(context), strict=True))


JUNK: list[Any] = [
    "",
    "null",
    "-1",
    "0",
    "3",
    "1e9",
    "99999999999",
    "[]",
    "{}",
    "[null]",
    "NaN",
    '{"loss": {"kl": -1}}',
    "x",
]


@pytest.mark.parametrize(
    "name", ["format_version", "num_pairs", "prefix_len", "logical_len", "windows", "info", "origin"]
)
def test_wrong_metadata_is_refused(written: tuple[Path, PortableContext], name: str) -> None:
    path, _ = written
    metadata, tensors = parts_of(path)
    for value in (None, *JUNK):
        wrong = {k: v for k, v in metadata.items() if k != name} | ({} if value is None else {name: value})
        fits = name == "prefix_len" and value in ("0", "3")  # another prefix would be possible
        forge(path, wrong, tensors)
        if not fits:
            assert_refused(path)


@pytest.mark.parametrize(
    "member",
    [{"method": 1}, {"keep_ratio": 2}, {"keep_ratio": "a"}, {"kv_nbytes": -1}, {"kv_nbytes": 1.5}, {"left_out": "codes"},
     {"left_out": [1]}, {"loss": []}, {"loss": {"agreement": 2}}],
)  # fmt: skip
def test_a_wrong_origin_is_refused(written: tuple[Path, PortableContext], member: dict[str, Any]) -> None:
    path, _ = written
    metadata, tensors = parts_of(path)
    forge(path, metadata | {"origin": json.dumps(json.loads(metadata["origin"]) | member)}, tensors)
    assert_refused(path, "origin")


def test_wrong_tensors_are_refused(written: tuple[Path, PortableContext]) -> None:
    path, _ = written
    metadata, tensors = parts_of(path)
    name = "layers.1.values"
    for wrong in (
        None,
        tensors[name][1:],
        tensors[name][:, :1],
        tensors[name].half(),
        tensors[name].flatten(),
        tensors[name].long(),
    ):
        found = {k: v for k, v in tensors.items() if k != name} | ({} if wrong is None else {name: wrong})
        forge(path, metadata, found)
        assert_refused(path)
    forge(path, metadata, tensors | {"extra": torch.zeros(1)})
    assert_refused(path)
    empty = {k: v[..., :0] if k.startswith("layers.1") else v for k, v in tensors.items()}
    forge(path, metadata, empty)
    assert_refused(path, "heads")


def test_a_file_of_a_later_version_says_so(written: tuple[Path, PortableContext]) -> None:
    path, _ = written
    metadata, tensors = parts_of(path)
    forge(path, metadata | {"format_version": "2"}, tensors)
    assert_refused(path, "pip install -U kvzip")


def test_neither_kind_is_taken_for_the_other(case: SimpleNamespace, written: tuple[Path, PortableContext]) -> None:
    path, _ = written
    with pytest.raises(kvzip.FormatError, match="portable layout"):
        store.read(path)
    case.context.save(path)
    assert_refused(path, "not a portable file")
    with pytest.raises(kvzip.FileError, match="No such file"):
        portable.read_info(path.parent / "nothing")


def test_parts_that_do_not_fit_are_not_written(written: tuple[Path, PortableContext]) -> None:
    path, context = written
    before, layer = path.read_bytes(), context.layers[-1]
    for wrong in (
        PortableLayer(layer.keys[1:], layer.values[1:], layer.window),
        PortableLayer(layer.keys.long(), layer.values),
    ):
        with pytest.raises(kvzip.InputError, match="can't store"):
            portable.write(path, replace(context, layers=(*context.layers[:-1], wrong)))
    with pytest.raises(kvzip.InputError, match="can't store"):
        portable.write(path, replace(context, logical_len=context.num_pairs - 1))
    with pytest.raises(kvzip.FileError):
        portable.write(path.parent, context)
    assert path.read_bytes() == before and not leftovers(path.parent)


# ---- the command


def test_the_command_writes_and_says_what_it_cost(tiny_kvz: Path, monkeypatch, capsys, tmp_path: Path) -> None:
    code, out, err = call(monkeypatch, capsys, tmp_path, "export", tiny_kvz, "--portable")
    info = portable.read_info(tmp_path / "text.kvp.safetensors")
    assert (code, err) == (0, "")
    assert re.search(rf"^Slots +{info.num_pairs} in every head", out, re.MULTILINE)
    assert re.search(r"^Loss +\S+ nats a token", out, re.MULTILINE)
    assert re.search(r"^Of the \.kvz +\S+ nats a token", out, re.MULTILINE)
    assert not any(line != line.rstrip() for line in out.splitlines())
    code, out, err = call(
        monkeypatch, capsys, tmp_path, "export", tiny_kvz, "--portable", "-r", "0.7", "--no-certificate", "--json"
    )
    found = json.loads(out)
    assert (code, err) == (0, "") and found.keys() >= JSON_KEYS
    assert found["loss"] is None and found["origin"]["loss"]["kl"] >= 0
    assert found["keep_ratio"] == pytest.approx(0.7, abs=0.01) and found["keep_ratio_asked"] == 0.7
    info = portable.read_info(tmp_path / found["path"])
    assert (info.num_pairs, info.sha256) == (found["num_pairs"], found["sha256"])


def test_the_command_refuses_in_one_line(tiny_kvz: Path, monkeypatch, capsys, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for words, *args in (
        ("one layout", tiny_kvz),
        ("keep ratio", tiny_kvz, "--portable", "-r", "2"),
        ("not a portable file", tiny_kvz, "--portable", "-o", "mine.txt"),
        ("does not exist", tiny_kvz, "--portable", "-o", "nowhere/doc"),
        ("No such file", "nothing.kvz", "--portable"),
        ("not a safetensors file", "mine.txt", "--portable"),
    ):
        code, out, err = call(monkeypatch, capsys, tmp_path, "export", *args)
        if words == "one layout":
            assert code == 2 and "--portable" in err
        else:
            assert code == 1 and words in err and len(err.splitlines()) == 1
        assert out == ""
    assert (tmp_path / "mine.txt").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1
    code, _, _ = call(monkeypatch, capsys, tmp_path, "export", tiny_kvz, "--portable", "-o", "mine.txt", "--force")
    assert code == 0 and portable.read_info(tmp_path / "mine.txt")
