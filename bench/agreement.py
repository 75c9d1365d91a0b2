"""Scores and kept pairs of kvpress' presses against those of kvzip's methods, on the same token ids.

    .venv/bin/python bench/agreement.py -m smollm2-135m --text squad.json --json bench/results/agreement.json

Both run in float32; kvpress runs in the environment that kvpress.py makes. Each press is compared as it is, then with
matching options, and then with one choice that differs, so that each difference has a cause.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from compared import KEEP_RATIOS, KVPRESS_CHUNK_LEN, SIDE, ask, check_repeats, overlap, spearman  # bench/compared.py
from safetensors.torch import load_file
from torch import Tensor

import kvzip
from kvzip.bench.measure import report, write_result
from kvzip.bench.texts import bench_text
from kvzip.compress import FullContext
from kvzip.methods import parse_method
from kvzip.ops.selection import PINNED, select_uniform
from kvzip.scorers.expected import ExpectedScorer
from kvzip.selecting import select

WORKER = SIDE / "kvpress_agreement.py"
AS_IS, MATCHED = "as they are", "matching"
BUDGET = "only the prefix differs: in the budget or not"
PREFIX_SCORED = "only the prefix differs: scored or not"
ROUNDING = "only rounding differs: down a head, or the total to the nearest"
POOLING = {"only pooling differs: average or maximum": "pooling=max"}
WINDOW = {"only the window differs: 32 or 64": "window_size=64", "only the kernel differs: 7 or 5": "kernel_size=5"}


@dataclass(frozen=True)
class Press:
    """A press and its counterpart.

    press, options, adakv: what the side environment is asked for, options to match.  own: our method as it is.
    method: ours with options to match.  causes: by label, the method with one choice changed.
    is_prefix_scored: whether a prefix changes the scores of what follows.  is_ranked: whether scores have an order.
    """

    press: str
    own: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    own_options: dict[str, Any] = field(default_factory=dict)
    causes: dict[str, str] = field(default_factory=dict)
    adakv: bool = False
    is_prefix_scored: bool = False
    is_ranked: bool = True


def window_causes(budget: str, changes: dict[str, str]) -> dict[str, str]:
    """Methods of average pooling but for one change."""
    base = {"pooling": "avg"}
    causes = {}
    for label, change in changes.items():
        options = base | dict([change.split("=")])
        causes[label] = "window:" + ",".join(f"{k}={v}" for k, v in options.items()) + f"+{budget}"
    return causes


PRESSES = {
    "KnormPress": Press("KnormPress", "l2-norm", "key-norm+uniform"),
    "SnapKVPress": Press(
        "SnapKVPress",
        "snapkv",
        "window:pooling=avg+uniform",
        options={"window_size": 32, "kernel_size": 7},
        causes=window_causes("uniform", POOLING | WINDOW),
        is_prefix_scored=True,
    ),
    "AdaKVPress(SnapKVPress)": Press(
        "SnapKVPress",
        "adakv",
        "window:pooling=avg+adakv",
        options={"window_size": 32, "kernel_size": 7},
        causes=window_causes("adakv", POOLING),
        adakv=True,
        is_prefix_scored=True,
    ),
    "PyramidKVPress": Press(
        "PyramidKVPress",
        "pyramidkv",
        "window:window_size=8,pooling=avg+pyramid",
        options={"window_size": 8, "kernel_size": 7},
        is_prefix_scored=True,
    ),
    "TOVAPress": Press("TOVAPress", "tova", "last-query+uniform"),
    "ObservedAttentionPress": Press(
        "ObservedAttentionPress",
        "h2o",
        "accumulated:reduce=mean,num_recent=0+uniform",
        causes={
            "only the reduction differs: mean or sum": "accumulated:num_recent=0+uniform",
            "only the recent tokens differ: pinned or not": "accumulated:reduce=mean+uniform",
        },
    ),
    "StreamingLLMPress": Press("StreamingLLMPress", "streaming-llm", "sinks-recent+uniform", is_ranked=False),
    "ExpectedAttentionPress": Press(
        "ExpectedAttentionPress",
        "expected-attention",
        "expected+uniform",
        causes={
            "only epsilon differs: 0 or 0.01": "expected:epsilon=0.01+uniform",
            "only the budget differs: uniform or Ada-KV": "expected+adakv",
        },
        is_prefix_scored=True,
    ),
    "KVzipPress, KVzip+": Press(
        "KVzipPress",
        "kvzip-plus",
        "kvzip-plus",
        options={"kvzip_plus_normalization": True},
        own_options={"kvzip_plus_normalization": True},
    ),
}


@dataclass(frozen=True)
class Side:
    """Scores [L, Hkv, n] and, by keep ratio, what is kept [L, Hkv, n], of the last n tokens."""

    scores: Tensor
    kept: dict[float, Tensor]


Stages = dict[str, tuple[Side, Side]]


class Ours:
    """Our scores of a text: of the context alone ("apart"), or with the prefix as a part of it ("counted")."""

    def __init__(self, llm: kvzip.LLM, prefix_ids: Tensor, context_ids: Tensor) -> None:
        whole = torch.cat([prefix_ids, context_ids])
        self.prefix_len = prefix_ids.numel()
        self._contexts = {
            "apart": FullContext(llm.engine(), prefix_ids, context_ids),
            "counted": FullContext(llm.engine(), prefix_ids[:0], whole),
        }
        for context in self._contexts.values():
            context.prefill()
        self._scores: dict[tuple[str, str], Tensor] = {}

    def context(self, prefix: str) -> FullContext:
        return self._contexts[prefix]

    def scores(self, prefix: str, method: str) -> Tensor:
        key = prefix, str(parse_method(method).scorer)
        if key not in self._scores:
            self._scores[key] = self._contexts[prefix].score(key[1], KVPRESS_CHUNK_LEN)
        return self._scores[key]

    def side(self, prefix: str, method: str, like: Side | None = None) -> Side:
        """What `method` keeps: the nearest count to the ratio, or as many pairs of these tokens as `like` keeps."""
        return keep(self.scores(prefix, method), method, like)

    def counted_statistics(self) -> Tensor:
        """Expected Attention's scores of the context, the prefix in the statistics but not in the softmax."""
        context = self._contexts["counted"]
        heads = context.engine.geometry.layers[context.engine.geometry.full_layers[0]].num_kv_heads
        scorer = ExpectedScorer((len(context.engine.geometry.full_layers), heads, context.length))
        context.read_again(scorer)
        scorer.num_sinks = self.prefix_len
        for index, layer in enumerate(context.engine.geometry.full_layers):
            keys, values = context.cache.layers[layer].read(slice(0, context.length))
            scorer.read(index, keys[0], values[0])
        return scorer.scores()[..., self.prefix_len :]


def keep(scores: Tensor, method: str, like: Side | None = None) -> Side:
    """Our budget over scores; see `Ours.side`."""
    parsed, kept = parse_method(method), {}
    for ratio in KEEP_RATIOS:
        pairs = round(ratio * scores.numel()) if like is None else int(like.kept[ratio][..., -scores.shape[-1] :].sum())
        kept[ratio] = select(scores, parsed, pairs, with_ranks=False).mask
    return Side(scores, kept)


def pyramid_line(length: int, keep_ratio: float, num_layers: int, window: int, *, falls_back: bool) -> list[int]:
    """kvpress' pairs a head in each layer: a line that counts the window in, beta 20.

    falls_back: the same count everywhere where the last layer would get less than the window, as kvpress has it.
    """
    mean = length * (1 - (1 - keep_ratio))
    last = mean / 20
    first = 2 * mean - last
    if first >= length - window:
        first = length - window
        last = 2 * mean - first
    if falls_back and not length >= first >= last >= window:
        return [max(1, round(mean))] * num_layers
    return [round(first - layer * (first - last) / max(1, num_layers - 1)) for layer in range(num_layers)]


def keep_line(scores: Tensor, window: int, *, falls_back: bool) -> Side:
    """The best of each head, as many as `pyramid_line` says."""
    num_layers, num_heads, length = scores.shape
    kept = {}
    for ratio in KEEP_RATIOS:
        counts = pyramid_line(length, ratio, num_layers, window, falls_back=falls_back)
        masks = [select_uniform(s.unsqueeze(0), num_heads * n) for s, n in zip(scores, counts, strict=True)]
        kept[ratio] = torch.cat(masks)
    return Side(scores, kept)


def of_context(side: Side, prefix_len: int) -> Side:
    return Side(side.scores[..., prefix_len:], {ratio: mask[..., prefix_len:] for ratio, mask in side.kept.items()})


def stages(press: Press, own: Side, theirs: Side, ours: Ours) -> Stages:
    """What is compared, by label.  own: kvpress as it is.  theirs: with options to match."""
    context_scores, apart = theirs.scores[..., ours.prefix_len :], ours.side("apart", press.method)
    found = {
        AS_IS: (own, ours.side("apart", press.own)),
        MATCHED: (theirs, ours.side("counted", press.method, theirs)),
        BUDGET: (theirs, keep(context_scores, press.method)),
        ROUNDING: (theirs, ours.side("counted", press.method)),
    }
    if not press.is_ranked:  # their scores hold for one ratio alone
        found[BUDGET] = theirs, apart
    if press.is_prefix_scored:
        found[PREFIX_SCORED] = keep(context_scores, press.method), apart
    for label, method in press.causes.items():
        found[label] = theirs, ours.side("counted", method, theirs)
    return found


def expected_stages(press: Press, own: Side, theirs: Side, ours: Ours) -> Stages:
    """Its prefix is scored in two ways."""
    found = stages(press, own, theirs, ours)
    rekept, apart = found.pop(PREFIX_SCORED)
    between = keep(ours.counted_statistics(), press.method)
    return found | {
        "only the prefix differs: in the softmax or not": (rekept, between),
        "only the prefix differs: in the statistics or not": (between, apart),
    }


def pyramid_stages(press: Press, own: Side, theirs: Side, ours: Ours) -> Stages:
    """Its budget is another; the causes of its scores are those of SnapKVPress."""
    window, method = press.options["window_size"], press.method
    scores = ours.scores("counted", method)
    line, counted = keep_line(scores, window, falls_back=False), ours.side("counted", method)
    found = stages(press, own, theirs, ours)
    del found[ROUNDING]
    return found | {
        MATCHED: (theirs, keep_line(scores, window, falls_back=True)),
        "only the fallback differs: the same count a layer, or the line": (theirs, line),
        "only the line differs: the window in it, or beside it": (line, ours.side("counted", method, line)),
        BUDGET: (counted, keep(scores[..., ours.prefix_len :], method)),
        "only pooling differs: average or maximum": (
            theirs,
            keep_line(ours.scores("counted", press.own), window, falls_back=True),
        ),
    }


def plus_stages(press: Press, own: Side, theirs: Side, ours: Ours) -> Stages:
    """theirs: with the whole prefix as sinks."""
    cut, apart = of_context(theirs, ours.prefix_len), ours.side("apart", press.method)
    own_context = of_context(own, ours.prefix_len)
    return {
        AS_IS: (own, apart),
        MATCHED: (cut, ours.side("apart", press.method, cut)),
        "only the softmax differs: over 4 sinks or the prefix": (keep(own_context.scores, press.method), apart),
        BUDGET: (own_context, keep(own_context.scores, press.method)),
    }


STAGES = {
    "ExpectedAttentionPress": expected_stages,
    "PyramidKVPress": pyramid_stages,
    "KVzipPress, KVzip+": plus_stages,
}


def heads(first: Tensor, second: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The two, head by head, of the tokens that both have: the last ones."""
    length = min(first.shape[-1], second.shape[-1])
    rows = (t[..., -length:].flatten(0, 1) for t in (first, second))
    return zip(*rows, strict=True)


def spread(values: list[float]) -> list[float]:
    """Median and least."""
    return [statistics.median(values), min(values)]


def compare(first: Side, second: Side, *, is_ranked: bool = True) -> dict[str, Any]:
    """Over the heads, median and least of the rank correlation and, by keep ratio, of the overlap; the share of all
    pairs that both keep; and the largest difference of scores, as a share of the largest score. Pinned pairs count as
    equals."""
    scores = [side.scores.clamp_max(PINNED) for side in (first, second)]
    found: dict[str, Any] = {
        "overlap": {
            str(r): spread([overlap(*rows) for rows in heads(first.kept[r], second.kept[r])]) for r in KEEP_RATIOS
        }
    }
    if is_ranked:
        found["spearman"] = spread([spearman(*rows) for rows in heads(*scores)])
        found["difference"] = max(float((a - b).abs()[b < PINNED].max()) for a, b in heads(*scores)) / float(
            scores[1][scores[1] < PINNED].abs().max()
        )
    return found


def jobs(prefix_len: int) -> dict[str, dict[str, Any]]:
    """What kvpress is asked for, by file: each press as it is, and with options to match."""
    found = {}
    for index, press in enumerate(PRESSES.values()):
        sinks = {"n_sink": prefix_len} if press.press == "KVzipPress" else {}
        for kind, options in (("own", press.own_options), ("matched", press.options | sinks)):
            found[f"{index}-{kind}"] = {"press": press.press, "options": options, "adakv": press.adakv}
    return found


def agreement(llm: kvzip.LLM, text: str) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """One row a press and stage, and the versions of the other environment."""
    prefix_ids, context_ids = torch.tensor(llm.prefix_ids(), dtype=torch.int64), llm.tokenize(text)
    wanted = {"ids": [*prefix_ids.tolist(), *context_ids.tolist()], "presses": jobs(prefix_ids.numel())}
    with ask(llm, WORKER, wanted) as folder:
        found = {name: load_file(folder / f"{name}.safetensors") for name in wanted["presses"]}
        versions = json.loads((folder / "versions.json").read_text())
    ours, rows = Ours(llm, prefix_ids, context_ids), []
    for index, (name, press) in enumerate(PRESSES.items()):
        seen = [found[f"{index}-{kind}"] for kind in ("own", "matched")]
        if "repeat_ids" in seen[0]:
            check_repeats(ours.context("apart"), seen[0]["repeat_ids"], KVPRESS_CHUNK_LEN)
        sides = [Side(f["scores"], {ratio: f[f"kept_{ratio}"] for ratio in KEEP_RATIOS}) for f in seen]
        for label, pair in STAGES.get(name, stages)(press, *sides, ours).items():
            rows.append({"press": name, "what": label, **compare(*pair, is_ranked=press.is_ranked)})
            print(name, label, {k: v for k, v in rows[-1].items() if k not in ("press", "what")}, flush=True)
    return rows, versions


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-m", "--model", required=True, help="a name of `kvzip models`")
    parser.add_argument("--context-len", type=int, default=600, help="at most one chunk of kvpress, 2,048")
    parser.add_argument("--text", help="a text, or SQuAD JSON; default: the bundled text")
    parser.add_argument("--json", required=True, help="the result file to write")
    args = parser.parse_args()
    if args.context_len > KVPRESS_CHUNK_LEN:
        raise SystemExit(f"--context-len {args.context_len} is out of range: give at most {KVPRESS_CHUNK_LEN}")
    llm = kvzip.load(args.model, dtype="float32")
    text = bench_text(llm, args.context_len, args.text)
    rows, versions = agreement(llm, text)
    figures = {
        f"{row['press']}, {ratio}": [row["overlap"][ratio][1]]
        for row in rows
        if row["what"] == MATCHED
        for ratio in row["overlap"]
    }
    more = {"other": versions, "rows": rows}
    result = report("agreement", llm, len(llm.tokenize(text)), KEEP_RATIOS[-1], args.text, figures, **more)
    write_result(result, args.json)


if __name__ == "__main__":
    main()
