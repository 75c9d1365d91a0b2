"""What was kept, as numbers, in the terminal and as a page; hostile text is inert in all of them."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_context import Shape, random_context
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kvzip.context import ContextInfo, RaggedContext, RaggedLayer
from kvzip.errors import FileError, InputError
from kvzip.inspect import html, summary
from kvzip.inspect.terminal import render
from kvzip.ops.quantize import Layout
from kvzip.ops.ragged import cu_seqlens_of, pack_bits

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(2)>",
    "[bold red]markup[/] [link=https://x]y[/link] :smile:",
    "\x1b[31mred\x1b]0;title\x07",
    "\x9b2J\x08\r\x00",
    "abc\u202egpj.exe\u2066\u200f\ufeff",
    "\u2028line\u2029",
    "{{data}} {{script}}",
    "\ud800",
    "\"&quot;'",
]
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\u2028\u2029\ufeff\ud800]")


def make_context(
    mask: torch.Tensor,
    ranks: torch.Tensor | None = None,
    *,
    windows: tuple[int, ...] = (),
    prefix_len: int = 3,
    **info,
) -> RaggedContext:
    """A context with that keep mask [Lf, Hkv, S]; layers at the indices `windows` are sliding-window ones."""
    num_full, num_heads, length = mask.shape
    full, layers = iter(mask), []
    for index in range(num_full + len(windows)):
        is_window = index in windows
        here = torch.ones(num_heads, 4) if is_window else torch.cat([torch.ones(num_heads, prefix_len), next(full)], 1)
        pairs = torch.zeros(int(here.sum()), 4)
        layers.append(RaggedLayer(pairs, pairs, cu_seqlens_of(here.bool()), 5 if is_window else None))
    known = ContextInfo(
        model="tiny",
        fingerprint="f",
        method="kvzip",
        dtype="float32",
        keep_ratio_asked=0.3,
        budget_asked=None,
        keep_ratio=float(mask.float().mean()) if mask.numel() else 1.0,
        full_kv_nbytes=4 * 4 * 2 * len(layers) * num_heads * (length + prefix_len),
        source="doc.txt",
    )
    ids = torch.arange(length, dtype=torch.int32)
    return RaggedContext(tuple(layers), ids[:prefix_len], ids, pack_bits(mask), ranks, replace(known, **info))


def ranked_context(length: int = 40, ratio: float = 0.3, **options) -> RaggedContext:
    """Two layers, three heads, random scores over one pool, the best `ratio` kept."""
    order = torch.randperm(6 * length, generator=torch.Generator().manual_seed(1)).reshape(2, 3, length)
    mask = order >= 6 * length - round(ratio * 6 * length)
    return make_context(mask, (order * 256 // (6 * length)).to(torch.uint8), **options)


def printed(context: RaggedContext, texts: list[str], *, width: int = 80, encoding: str = "utf-8", **options) -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    limit = {"max_tokens": options.pop("max_tokens")} if "max_tokens" in options else {}
    render(context, texts, Console(file=stream, width=width, **options), **limit)
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)


class Page(HTMLParser):
    """Elements, attributes and the text of style and script elements of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.raw: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_data(self, data):
        if self.cdata_elem:
            self.raw.append(data)

    @property
    def data(self):
        return next(json.loads(text) for text in self.raw if text.startswith('{"texts"'))


# ---- numbers ----


def test_counts_agree_with_the_keep_mask():
    context = ranked_context()
    mask = context.keep_mask
    assert torch.equal(summary.head_counts(context), mask.sum(2))
    assert torch.equal(summary.token_counts(context), mask.sum((0, 1)))
    assert torch.allclose(summary.head_share(context), mask.float().mean(2))
    assert torch.allclose(summary.importance(context), mask.float().mean((0, 1)))


def test_histogram_has_evicted_tokens_first_and_closed_upper_edges():
    kept = torch.tensor([0, 1, 5, 6, 10, 10])
    mask = (torch.arange(10)[:, None] < kept).reshape(5, 2, 6)
    assert summary.token_histogram(make_context(mask)) == [1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 2]
    assert summary.token_histogram(make_context(mask), bins=2) == [1, 2, 3]


def test_ranks_give_the_mask_of_a_ratio():
    context = ranked_context()
    assert summary.mask_at(context, 1.0).all()
    assert torch.equal(summary.mask_at(context, 0.25), context.ranks >= 192)
    assert [summary.min_rank(r) for r in (1.0, 0.75, 0.5, 0.3)] == [0, 64, 128, 180]
    assert summary.rank_agreement(context) > 0.98
    with pytest.raises(InputError, match="out of range"):
        summary.mask_at(context, 0.0)
    with pytest.raises(InputError, match="no ranks"):
        summary.mask_at(replace(context, ranks=None), 0.3)


def test_json_is_a_contract():
    context = ranked_context(windows=(1,), loss={"kl": 0.01})
    data = json.loads(json.dumps(summary.inspect_json(context)))
    assert data["pairs_per_head"] == context.pairs_per_head
    assert [len(heads) for heads in data["pairs_per_head"]] == [3, 3, 3]
    assert set(context.info.to_dict()) <= set(data)
    assert data["context_len"] == 40
    assert data["prefix_len"] == 3
    assert data["kv_nbytes"] == context.kv_nbytes
    assert data["full_kv_nbytes"] == context.info.full_kv_nbytes
    assert data["keep_ratio"] == pytest.approx(0.3)
    assert data["full_layers"] == [0, 2]


@pytest.mark.parametrize(("share", "label"), [(0.0, "0"), (0.001, "<1"), (0.3, "30"), (0.999, "99"), (1.0, "100")])
def test_percent_label_is_0_or_100_only_where_exact(share, label):
    assert summary.percent_label(share) == label


def test_words():
    assert summary.format_ranges([0, 1, 2, 5, 7, 8]) == "0–2, 5, 7–8"
    assert summary.format_bytes(900) == "900 B"
    assert summary.format_bytes(1.5 * 2**20) == "1.5 MiB"
    assert summary.glyph_spans(["a", "", "", "€", "b", ""]) == [(0, 1), (1, 4), (4, 5), (5, 6)]
    assert summary.glyph_spans([]) == []
    assert summary.printable("a\r\nb\t\x1b[1m\u202e") == "a\nb\t⟨U+001B⟩[1m⟨U+202E⟩"


def test_wrong_number_of_texts_is_refused():
    with pytest.raises(InputError, match="3 token texts for 40"):
        html.to_html(ranked_context(), ["a"] * 3)


# ---- token texts ----


def byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    merges = [("h", "e"), ("l", "l")]
    vocab |= {"he": len(vocab), "ll": len(vocab) + 1}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


class AsTransformers:
    """The `decode` of a transformers tokenizer over a `tokenizers` one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def decode(self, ids, skip_special_tokens=False, clean_up_tokenization_spaces=False):
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize("text", ["hello", "", "naïve €5 → 😀😀 日本語\n", "\ufffd\ufffd real ones \ufffd", " a  b "])
def test_token_texts_join_to_the_decoded_text(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text).ids
    texts = summary.token_texts(AsTransformers(tokenizer), ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == text


def test_a_character_of_several_tokens_belongs_to_its_last():
    tokenizer = byte_tokenizer()
    texts = summary.token_texts(AsTransformers(tokenizer), tokenizer.encode("he€😀ll").ids)
    assert texts == ["he", "", "", "€", "", "", "", "😀", "ll"]


def test_token_texts_of_broken_utf8_are_whole_and_local():
    tokenizer = byte_tokenizer()
    euro = tokenizer.encode("€").ids
    ids = [*euro[:2], *tokenizer.encode("he").ids, *euro[1:] * 20, *euro, euro[0]]
    texts = summary.token_texts(AsTransformers(tokenizer), torch.tensor(ids))
    assert "".join(texts) == tokenizer.decode(ids)
    assert "he" in texts
    assert "€" in texts


def test_token_texts_of_a_sentencepiece_like_tokenizer():
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁he": 256, "▁": 257, "y": 258}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    ids = [257, 256, 257, *"€".encode(), 256, 258, 0xFF, 258]
    texts = summary.token_texts(AsTransformers(tokenizer), ids)
    assert "".join(texts) == tokenizer.decode(ids)
    assert texts[3:8] == ["", "", "€", " he", "y"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 257), max_size=30))
def test_token_texts_join_for_any_tokens(ids):
    tokenizer = byte_tokenizer()
    texts = summary.token_texts(AsTransformers(tokenizer), ids)
    assert "".join(texts) == tokenizer.decode(ids)
    assert len(texts) == len(ids)


# ---- terminal ----


@pytest.mark.parametrize(
    ("loss", "line"),
    [
        ({"kl": 0.0123, "kl_bound": 0.0311, "confidence": 0.95, "agreement": 0.97, "tokens": 1048},
         "0.012 nats a token (95 %: below 0.031), 97 % of 1,048 tokens agree"),
        ({"kl": 0.0, "agreement": 0.9999, "tokens": 7}, "0 nats a token, 99 % of 7 tokens agree"),
        ({"agreement": 1, "tokens": 7}, "100 % of 7 tokens agree"),
        ({"kl": 2, "kl_bound": 3.5, "later": "[red]"}, "2 nats a token"),
        ({"later": "[red]"}, None),
        (None, None),
    ],
)  # fmt: skip
def test_the_loss_is_one_line(loss, line):
    context = ranked_context(loss=loss)
    assert dict(summary.facts(context)).get("Loss") == line
    if line is not None:
        assert f"<dt>Loss</dt><dd>{html._prose(line)}</dd>" in html.to_html(context, ["x"] * 40)
        assert line[:30] in " ".join(printed(context, ["x"] * 40).split())


def test_terminal_shows_facts_map_and_text():
    context = ranked_context(windows=(0,))
    out = printed(context, [f" w{i}" for i in range(40)], color_system="truecolor", force_terminal=True)
    plain = re.sub(r"\x1b\[[\d;]*m", "", out)
    assert "kvzip" in plain
    assert "sliding-window layers 0 (window of 5 tokens)" in plain
    assert re.search(r"L1 +\d+ +\d+ +\d+", plain)
    assert "w39" in plain
    assert "\x1b[" in out
    assert max(map(len, plain.splitlines())) <= 80


def test_terminal_fits_80_columns_with_many_layers_and_heads():
    mask = torch.rand(48, 40, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    plain = printed(make_context(mask), ["x"] * 8)
    assert max(map(len, plain.splitlines())) <= 80
    assert re.search(r"head .* 39", plain)
    assert "L47" in plain


@pytest.mark.parametrize("options", [{}, {"no_color": True, "force_terminal": True, "color_system": "truecolor"}])
def test_without_color_blocks_show_the_shares(options):
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    for head, kept in enumerate((0, 1, 2, 4)):
        mask[0, head, :kept] = True
    out = printed(make_context(mask), ["one", " two", " three", " four"], **options)
    plain = re.sub(r"\x1b\[[\d;]*m", "", out)
    assert "\x1b[3" not in out
    assert "\x1b[4" not in out
    assert "·  0░ 25▒ 50█100" in plain
    assert re.search(r"one two three four *\n  ▓▓▓▒▒▒▒░░░░░░░░░░░ ", plain)
    assert "· none, up to ░ 25" in plain


def test_a_stream_without_utf8_gets_ascii():
    out = printed(ranked_context(), ["é\u202e"] * 40, encoding="latin-1")
    assert out.isascii()
    assert "\\xe9" in out


def test_long_text_is_cut_with_a_note():
    out = printed(ranked_context(), [f" w{i}" for i in range(40)], max_tokens=10)
    assert "w9" in out
    assert "w10" not in out
    assert "30 of 40 tokens more" in out


@pytest.mark.parametrize("color", [None, "truecolor"])
def test_hostile_text_is_inert_in_the_terminal(color):
    texts = HOSTILE + ["x"] * (40 - len(HOSTILE))
    context = ranked_context(source="".join(HOSTILE), model=HOSTILE[3], loss={"[red]x": "\x1b[1m"})
    context = replace(context, info=replace(context.info, system=HOSTILE[5]))
    out = printed(context, texts, color_system=color, force_terminal=color is not None, width=200)
    plain = re.sub(r"\x1b\[[\d;]*m", "", out) if color else out
    assert not CONTROLS.search(plain)
    assert "[bold red]markup[/]" in plain
    assert ":smile:" in plain
    assert "⟨U+001B⟩[31mred⟨U+001B⟩]0;title⟨U+0007⟩" in plain
    assert "[31m" not in plain.replace("⟨U+001B⟩[31m", "")
    assert "8;" not in plain  # no hyperlink


# ---- page ----


def test_page_is_inert_under_hostile_text():
    context = ranked_context(source="/a/" + "".join(HOSTILE[:1]) + HOSTILE[5], model=HOSTILE[1], method=HOSTILE[3])
    text = html.to_html(context, HOSTILE + ["x"] * (40 - len(HOSTILE)))
    page, calm = Page(text), Page(html.to_html(ranked_context(), ["x"] * 40))
    assert page.tags.count("script") == 2
    assert page.tags == calm.tags  # no element more
    assert "onerror" not in {name for _, name, _ in page.attributes}
    assert not CONTROLS.search(text)
    assert page.data["texts"][:2] == HOSTILE[:2]
    assert page.data["texts"][7] == "{{data}} {{script}}"
    assert page.data["texts"][8] == "⟨U+D800⟩"


def test_page_refers_to_nothing_outside():
    text = html.to_html(ranked_context(), ["x"] * 40)
    page = Page(text)
    links = [value for _, name, value in page.attributes if name in ("src", "href", "action", "srcset", "data")]
    assert links == ["data:,"]
    addresses = set(re.findall(r"\w+://[^\s\"'`]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}  # the name of the SVG namespace, never fetched
    assert not re.search(r"@import|url\(|innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b", text)


def test_policy_admits_exactly_the_style_and_script_of_the_page():
    page = Page(html.to_html(ranked_context(), ["x"] * 40))
    policy = next(v for tag, name, v in page.attributes if tag == "meta" and name == "content" and "default-src" in v)
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    style, script = page.raw[0], page.raw[-1]
    for text in (style, script):
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy
    assert not any(name == "style" or name.startswith("on") for _, name, _ in page.attributes)


def test_page_data_is_the_context():
    context = ranked_context(windows=(0,))
    data = Page(html.to_html(context, ["x"] * 40)).data
    assert base64.b64decode(data["bits"]) == context.kept_bits.numpy().tobytes()
    assert base64.b64decode(data["ranks"]) == context.ranks.numpy().tobytes()
    assert data["layers"] == [1, 2]
    assert data["storedPairs"] == int(context.keep_mask.sum())
    assert data["pairBytes"] == 2 * 4 * 4
    assert data["nbytes"] == context.kv_nbytes


def test_page_of_a_large_context_holds_counts_per_step(monkeypatch):
    monkeypatch.setattr(html, "DETAIL_LIMIT", 100)
    context = ranked_context()
    data = Page(html.to_html(context, ["x"] * 40)).data
    assert "ranks" not in data
    tokens = torch.frombuffer(bytearray(base64.b64decode(data["tokenSteps"])), dtype=torch.uint16).reshape(-1, 40)
    heads = torch.frombuffer(bytearray(base64.b64decode(data["headSteps"])), dtype=torch.uint32).reshape(-1, 6)
    for step, by_token, by_head in zip(data["steps"], tokens, heads, strict=True):
        mask = summary.mask_at(context, step / 100)
        assert by_token.tolist() == mask.sum((0, 1)).tolist()
        assert by_head.tolist() == mask.sum(2).flatten().tolist()


def test_page_without_ranks_and_without_compressed_layers():
    context = ranked_context()
    assert "ranks" not in Page(html.to_html(replace(context, ranks=None), ["x"] * 40)).data
    nothing = make_context(torch.zeros(0, 2, 5, dtype=torch.bool), windows=(0, 1))
    assert Page(html.to_html(nothing, ["x"] * 5)).data["layers"] == []
    assert "nothing was compressed" in printed(nothing, ["x"] * 5)


def test_write_html_is_whole_or_not_at_all(tmp_path, monkeypatch):
    context, target = ranked_context(), tmp_path / "page.html"
    html.write_html(context, ["ü"] * 40, target)
    assert target.read_text(encoding="utf-8") == html.to_html(context, ["ü"] * 40)

    def fail(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(html.os, "replace", fail)
    with pytest.raises(FileError, match="Permission denied") as caught:
        html.write_html(context, ["y"] * 40, target)
    assert "\n" not in str(caught.value)
    assert "ü" in json.dumps(Page(target.read_text(encoding="utf-8")).data, ensure_ascii=False)
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_write_html_names_a_missing_folder(tmp_path):
    with pytest.raises(FileError, match="its folder does not exist"):
        html.write_html(ranked_context(), ["x"] * 40, tmp_path / "no" / "page.html")
    with pytest.raises(FileError, match="it is a folder"):
        html.write_html(ranked_context(), ["x"] * 40, tmp_path)


def test_what_is_stored_in_codes_says_in_how_many_bits():
    layouts = ((Layout(8, "token", 4), Layout(4, "token", 4)), (Layout(3, "channel", 8, mixed=True), None))
    context, _ = random_context(Shape(head_dim=8, levels=layouts))
    assert dict(summary.facts(context))["Stored as"] == "codes of 8 + 4, 3 + 32 bits, read as float32"
    assert dict(summary.facts(random_context(Shape())[0]))["Stored as"] == "float32"
    assert "of 16-bit numbers)" in summary.factor(context), "what a recipe goes by"
    plain, _ = random_context(Shape())
    assert re.fullmatch(r"\d+\.\d×", summary.factor(plain))
    asked = replace(plain, info=replace(plain.info, budget_asked="8x"))
    assert "of 16-bit numbers)" in summary.factor(asked)
