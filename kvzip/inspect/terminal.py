"""What a compressed context kept, drawn in the terminal with rich.

Everything from the context passes `printable` and is printed as Text, never as markup, so that no text can steer
the terminal. Without color, block characters stand for the shades; without UTF-8, plain ASCII.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.style import Style
from rich.table import Table
from rich.text import Text

from kvzip.context import RaggedContext
from kvzip.inspect import summary

GONE = Style(dim=True, strike=True)
GONE_BAR, BAR = Style(color="#8a9296"), Style(color="#3a8f8a")
RAMP = tuple(  # (background, text) from few pairs kept to all: lightness rises, so it needs no color vision
    Style(bgcolor=background, color=text)
    for background, text in (
        ("#1d2b33", "#c3ced3"),
        ("#1f3b45", "#d3dee0"),
        ("#234e57", "#e3eeee"),
        ("#2a646a", "#f2f8f7"),
        ("#3a7f7d", "#ffffff"),
        ("#6aa58c", "#0e1512"),
        ("#a9c68a", "#0e1512"),
        ("#ecd98b", "#0e1512"),
    )
)
BLOCKS, ASCII_BLOCKS = "·░▒▓█", ".-+*#"  # none, then quarters
TO_ASCII = {ord("×"): "x", ord("–"): "-", ord("…"): "...", ord("·"): ".", ord("█"): "#", ord("⟨"): "<", ord("⟩"): ">"}
INDENT, CELL_WIDTH, LABEL_WIDTH, GROUP_GAP = 2, 4, 5, 3


@dataclass(frozen=True)
class Look:
    """How to draw: plain = no color, ascii_only = the stream takes nothing else, width in character cells."""

    plain: bool
    ascii_only: bool
    width: int

    @classmethod
    def of(cls, console: Console) -> Look:
        plain = console.no_color or console.color_system is None
        return cls(plain, console.options.ascii_only, max(24, console.width - INDENT))

    def text(self, text: str, style: str | Style = "") -> Text:
        """Text that the stream can take."""
        return Text(self.clean(text), style)

    def clean(self, text: str) -> str:
        if not self.ascii_only:
            return text
        return text.translate(TO_ASCII).encode("ascii", "backslashreplace").decode()

    def block(self, share: float) -> str:
        """The block character of a share in [0, 1]."""
        return (ASCII_BLOCKS if self.ascii_only else BLOCKS)[_level(share, 4)]

    def style(self, share: float) -> Style:
        """The colors of a share in [0, 1]; none where there is no color."""
        if self.plain:
            return Style.null()
        return GONE if share == 0 else RAMP[_level(share, len(RAMP)) - 1]


def render(context: RaggedContext, token_texts: Sequence[str], console: Console, *, max_tokens: int = 800) -> None:
    """Print facts, heat map, histogram and the first `max_tokens` tokens, shaded by what was kept of them; 0 = no text.

    token_texts: one a context token (`summary.token_texts`).  Raises InputError if their number is wrong.
    """
    summary.check_texts(context, token_texts)
    look = Look.of(console)
    sections = [
        ("What was kept", _facts(context, look)),
        ("By layer and KV head: percent of the context's pairs kept", _heat_map(context, look)),
        ("By token: how many tokens kept which share of their pairs", _histogram(context, look)),
    ]
    if max_tokens > 0:
        text = _shaded_text(context, token_texts, look, max_tokens)
        sections.append(("The text: shaded by the share of a token's pairs kept", text))
    for title, body in sections:
        console.print()
        console.print(look.text(title, "bold"))
        console.print(Padding(body, (1, 0, 0, INDENT), expand=False))
    console.print()


def _level(share: float, levels: int) -> int:
    """0 for nothing, else the 1-based step of `levels` that the share falls in."""
    return 0 if share <= 0 else min(levels, -int(-share * levels // 1))


def _facts(context: RaggedContext, look: Look) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, value in summary.facts(context):
        table.add_row(look.text(name, "dim"), look.text(value))
    return table


def _legend(look: Look) -> Text:
    """The scale as one line: a swatch a step, with its upper bound in percent."""
    legend = Text.assemble(look.text("pairs kept  ", "dim"))
    if look.plain:
        quarters = "  ".join(f"{look.block(i / 4)} {25 * i}" for i in range(1, 5))
        return legend.append(f"{look.block(0)} none, up to {quarters} %")
    legend.append("none", GONE).append("  up to  ", "dim")
    for i in range(1, len(RAMP) + 1):
        legend.append(f"{int(100 * i / len(RAMP) + 0.5):>4} ", look.style(i / len(RAMP)))
    return legend.append(" %", "dim")


def _heat_map(context: RaggedContext, look: Look) -> RenderableType:
    """Layers down, heads across; few heads stand in several columns of layers, many heads in several maps."""
    share = summary.head_share(context).tolist()
    num_heads = context.kept_shape[1]
    step = max(1, (look.width - LABEL_WIDTH) // CELL_WIDTH)
    parts: list[RenderableType] = []
    for first in range(0, num_heads, step) if share else ():
        heads = range(first, min(num_heads, first + step))
        parts += [*_map_lines(context.full_layers, share, heads, look), Text()]
    parts += [_legend(look)] if share else [look.text("no full-attention layers: nothing was compressed")]
    for layers, window in summary.sliding_layers(context):
        where = summary.format_ranges(layers)
        note = f"Not compressed: sliding-window layers {where} (window of {window:,} tokens)"
        parts.append(look.text(note, "dim"))
    return Group(*parts)


def _map_lines(layers: Sequence[int], share: list[list[float]], heads: range, look: Look) -> Iterator[Text]:
    block_width = LABEL_WIDTH + CELL_WIDTH * len(heads) + GROUP_GAP
    num_groups = max(1, min((look.width + GROUP_GAP) // block_width, -(-len(layers) // 4)))
    num_rows = -(-len(layers) // num_groups)
    num_groups = -(-len(layers) // num_rows)
    head = "head".ljust(LABEL_WIDTH) + "".join(f"{h:>{CELL_WIDTH}}" for h in heads)
    yield look.text((" " * GROUP_GAP).join([head] * num_groups), "dim")
    for row in range(num_rows):
        line = Text()
        for index in range(row, len(layers), num_rows):
            line.append(" " * GROUP_GAP if index >= num_rows else "")
            line.append(f"L{layers[index]}".ljust(LABEL_WIDTH), "dim")
            for h in heads:
                line.append_text(_cell(share[index][h], look))
        yield line


def _cell(share: float, look: Look) -> Text:
    label = summary.percent_label(share)
    if look.plain:
        return Text(f"{look.block(share)}{label:>{CELL_WIDTH - 1}}")
    style = Style(dim=True) if share == 0 else look.style(share)
    return Text(f"{label:>{CELL_WIDTH - 1}} ", style)


def _histogram(context: RaggedContext, look: Look, bins: int = 10) -> Table:
    counts = summary.token_histogram(context, bins)
    table = Table.grid(padding=(0, 2))
    for justify in ("right", "right", "right", "left"):
        table.add_column(justify=justify, no_wrap=True)  # type: ignore[arg-type]
    most, bar_width = max(1, *counts), max(8, look.width - 34)
    for i, count in enumerate(counts):
        name = "none" if i == 0 else f"{(i - 1) * 100 // bins}–{i * 100 // bins} %"
        length = -(-count * bar_width // most)
        share = summary.format_percent(count / max(1, context.context_len))
        bar = look.text("█" * length, GONE_BAR if i == 0 else BAR)
        table.add_row(look.text(name, "dim"), look.text(f"{count:,}"), look.text(share, "dim"), bar)
    return table


def _shaded_text(context: RaggedContext, token_texts: Sequence[str], look: Look, max_tokens: int) -> RenderableType:
    shown = min(max_tokens, context.context_len)
    share = summary.importance(context)
    text = Text(no_wrap=False, overflow="fold")
    for start, stop in summary.glyph_spans(token_texts[:shown]):
        value = float(share[start:stop].mean())
        piece = look.clean(summary.printable("".join(token_texts[start:stop])))
        text.append(piece, look.style(value) + Style(meta={"share": value}))
    body: RenderableType = Group(*_underlined(text, look)) if look.plain else text
    left = context.context_len - shown
    note = f"… {left:,} of {context.context_len:,} tokens more, not shown here" if left else ""
    return Group(_legend(look), Text(), body, *([Text(), look.text(note, "dim")] if note else []))


def _underlined(text: Text, look: Look) -> Iterator[Text]:
    """The wrapped text, under each line a line of block characters: the share of the token above each."""
    for line in text.wrap(Console(width=look.width, color_system=None), look.width, overflow="fold"):
        marks = [" "] * len(line.plain)
        for start, end, style in line.spans:
            if isinstance(style, Style):
                marks[start:end] = [look.block(style.meta["share"])] * (end - start)
        wide = [mark * cell_len(char) for mark, char in zip(marks, line.plain, strict=True)]
        yield Text(line.plain)
        yield Text("".join(wide).rstrip())
