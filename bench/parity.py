"""kvpress' KVzipPress and kvzip on the same token ids: scores, kept pairs, answers, and what the differences come from.

    .venv/bin/python bench/parity.py -m smollm2-135m --text squad.json --json bench/results/parity-smollm2-135m.json

Both run in float32. kvpress runs in the environment that kvpress.py makes. Stages (`STAGES` says what they are) compare
the kept pairs at several keep ratios and the ranks of the scores head by head; answers are greedy, at one keep ratio.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from compared import KEEP_RATIOS, KVPRESS_CHUNK_LEN, SIDE, ask, check_repeats, overlap, spearman  # bench/compared.py
from safetensors.torch import load_file
from torch import Tensor

import kvzip
from kvzip.bench.measure import report, write_result
from kvzip.chunks import CHUNK_LEN, chunk_slices
from kvzip.compress import pack_context
from kvzip.eval.metrics import f1, included, mean_and_error
from kvzip.eval.tasks.base import Question, Sample, TaskSettings, choose
from kvzip.eval.tasks.squad import Squad
from kvzip.methods import parse_method
from kvzip.ops.selection import select_global
from kvzip.scorers.base import Observation
from kvzip.scorers.reconstruction import FaithfulReconstructionScorer
from kvzip.selecting import Selection

WORKER = SIDE / "kvpress_parity.py"
NUM_SINKS = 4  # of kvpress
MAX_NEW_TOKENS = 32
STAGES = {
    "as_is": "both as they are",
    "four_sinks": "matching: kvzip's softmax over 4 sinks",
    "rebuilt": "matching: kvpress' budget in kvzip too",
    "whole_prefix": "matching: kvpress with the whole prefix as sinks",
    "only_softmax_keys": "only the softmax differs: 4 sinks or the prefix",
    "only_count": "only the budget differs: prefix counted or not",
    "only_chunks": "only the chunks differ",
}
ANSWERS = {
    "kvzip_full": "kvzip, full cache",
    "kvpress_full": "kvpress, full cache",
    "kvzip_own": "kvzip",
    "kvpress_own": "kvpress",
    "kvpress_matched": "kvpress, whole prefix as sinks, the same count",
    "kvzip_with_kvpress_pairs": "kvzip with the context pairs of kvpress, the prefix kept",
}
COMPARED = (  # answers
    ("kvpress_full", "kvzip_full"),
    ("kvpress_own", "kvzip_own"),
    ("kvpress_matched", "kvzip_own"),
    ("kvzip_with_kvpress_pairs", "kvzip_own"),  # only the kept pairs differ
    ("kvzip_with_kvpress_pairs", "kvpress_own"),  # only the prefix differs
)
Figures = defaultdict[str, list[float]]


class FewSinksScorer(FaithfulReconstructionScorer):
    """kvpress' softmax: of the prefix only the first tokens are in it."""

    def _column_scores(self, obs: Observation) -> Tensor:
        return super()._column_scores(replace(obs, prefix_keys=obs.prefix_keys[:, :NUM_SINKS]))


def keep_with_prefix(scores: Tensor, prefix_len: int, keep_ratio: float) -> Tensor:
    """kvpress' budget in our code: the ratio counts prefix and context, and of the prefix only the sinks are protected.

    scores: [L, Hkv, S] of the context.  Returns [L, Hkv, P + S] bool.
    """
    unscored = scores.new_zeros(*scores.shape[:2], prefix_len)
    whole = torch.cat([unscored, scores], dim=-1)
    whole[..., :NUM_SINKS] = whole.amax() + 1
    return select_global(whole, whole.numel() - int(whole.numel() * (1 - keep_ratio)))


def keep(scores: Tensor, keep_ratio: float) -> Tensor:
    """What kvzip keeps of these scores."""
    return select_global(scores, max(1, round(keep_ratio * scores.numel())))


def ask_kvpress(
    llm: kvzip.LLM, contexts: list[dict[str, Any]], chunk_len: int
) -> tuple[list[dict[str, dict[str, Tensor]]], list[dict[str, list[str]]], dict[str, str]]:
    """By context what it found and answered, by kind (see the worker); and the versions of its environment."""
    job = {"chunk_len": chunk_len, "max_new_tokens": MAX_NEW_TOKENS, "contexts": contexts}
    with ask(llm, WORKER, job) as folder:
        kinds = ("own", "matched")
        found = [{k: load_file(folder / f"{i}-{k}.safetensors") for k in kinds} for i in range(len(contexts))]
        answered = json.loads((folder / "answers.json").read_text())
    return found, answered["answers"], answered["versions"]


def compare_scores(
    full: kvzip.Prefilled, found: dict[str, dict[str, Tensor]], own_chunk_len: int, chunk_len: int
) -> Figures:
    """The stages on one context.  found: what kvpress found.  chunk_len: that of kvpress."""
    context, method = full._full, parse_method("kvzip")
    prefix_len = context.prefix_ids.numel()
    check_repeats(context, found["own"]["repeat_ids"], chunk_len)
    scores = {kind: f["scores"][..., prefix_len:] for kind, f in found.items()}
    as_is = full.scores(method, own_chunk_len)
    few_sinks = FewSinksScorer(as_is.shape)
    context.replay(few_sinks, chunk_len, merge_short=False)
    ours, total = few_sinks.scores(), context.context_ids.numel()
    same_chunks = chunk_slices(total, own_chunk_len) == chunk_slices(total, chunk_len, merge_short=False)
    whole_prefix = as_is if same_chunks else context.score(chunk_len=chunk_len, faithful=True)
    ranked = {
        "as_is": (scores["own"], as_is),
        "four_sinks": (scores["own"], ours),
        "whole_prefix": (scores["matched"], whole_prefix),
        "only_softmax_keys": (scores["own"], whole_prefix),
    }
    if not same_chunks:
        ranked["only_chunks"] = (scores["matched"], as_is)
    figures: Figures = defaultdict(list)
    for stage, (theirs, mine) in ranked.items():
        figures[f"{stage}_spearman"] = [
            spearman(*rows) for rows in zip(theirs.flatten(0, 1), mine.flatten(0, 1), strict=True)
        ]
        figures[f"{stage}_difference"] = [float((theirs - mine).abs().max())]
    for ratio in KEEP_RATIOS:
        kept = {kind: f[f"kept_{ratio}"] for kind, f in found.items()}
        of_context = {kind: mask[..., prefix_len:] for kind, mask in kept.items()}
        masks = {stage: (keep(theirs, ratio), keep(mine, ratio)) for stage, (theirs, mine) in ranked.items()}
        masks["as_is"] = of_context["own"], keep(as_is, ratio)
        masks["whole_prefix"] = of_context["matched"], keep(whole_prefix, ratio)
        masks["rebuilt"] = kept["own"], keep_with_prefix(ours, prefix_len, ratio)
        masks["only_count"] = of_context["own"], keep(scores["own"], ratio)
        for stage, pair in masks.items():
            figures[f"{stage}_overlap_{ratio}"].append(overlap(*pair))
        for kind, mask in kept.items():
            figures[f"kvpress_{kind}_prefix_kept_{ratio}"].append(mask[..., :prefix_len].float().mean().item())
            figures[f"kvpress_{kind}_context_kept_{ratio}"].append(of_context[kind].float().mean().item())
    return figures


def own_answers(
    full: kvzip.Prefilled, pairs: Tensor, questions: Sequence[Question], chunk_len: int
) -> dict[str, list[str]]:
    """Answers from the full cache, from what kvzip keeps, and from `pairs` of the context [L, Hkv, S] (bool)."""
    own = full.compress(kvzip.CompressOptions(keep_ratio=KEEP_RATIOS[-1], chunk_len=chunk_len, certify=False))
    packed = pack_context(full._full, Selection(pairs, None), own.data.info, release=False)
    contexts = {
        "kvzip_full": full.compress(kvzip.CompressOptions(keep_ratio=1.0, certify=False)),
        "kvzip_own": own,
        "kvzip_with_kvpress_pairs": kvzip.CompressedContext(full.llm, packed),
    }
    return {
        name: [str(context.ask(question.text, max_new_tokens=MAX_NEW_TOKENS)) for question in questions]
        for name, context in contexts.items()
    }


def compare_answers(given: dict[str, list[str]], questions: Sequence[Question]) -> Figures:
    """Scores of the answers of one context, and which are equal.  given: by name, as in `ANSWERS`."""
    figures: Figures = defaultdict(list)
    for name, answers in given.items():
        for answer, question in zip(answers, questions, strict=True):
            figures[f"{name}_included"].append(included(answer, question.golds))
            figures[f"{name}_f1"].append(f1(answer, question.golds))
    for one, other in COMPARED:
        pairs = zip(given[one], given[other], strict=True)
        figures[f"{one}_same_as_{other}"] = [float(a.strip() == b.strip()) for a, b in pairs]
    return figures


def answer_rows(by_context: list[Figures]) -> list[dict[str, Any]]:
    """What is said of each kind of answer: mean and standard error of its scores, and how many equal another's."""
    rows = []
    for name, label in ANSWERS.items():
        same = {}
        for one, other in COMPARED:
            if one == name:
                equal = [v for figures in by_context for v in figures[f"{one}_same_as_{other}"]]
                same[ANSWERS[other]] = [int(sum(equal)), len(equal)]
        scores = {m: mean_and_error(figures[f"{name}_{m}"] for figures in by_context) for m in ("included", "f1")}
        rows.append({"answers": label, **scores, "same": same})
    return rows


def parity(
    llm: kvzip.LLM, samples: list[Sample], own_chunk_len: int, chunk_len: int
) -> tuple[list[Figures], dict[str, str]]:
    """The figures of each context, and the versions of the other environment."""
    prefix_ids = llm.prefix_ids()
    contexts = [
        {
            "ids": [*prefix_ids, *llm.tokenize(sample.context).tolist()],
            "prefix_len": len(prefix_ids),
            "questions": [llm.question_ids(question.text) for question in sample.questions],
        }
        for sample in samples
    ]
    found, answers, versions = ask_kvpress(llm, contexts, chunk_len)
    by_context = []
    for sample, seen, given in zip(samples, found, answers, strict=True):
        full = llm.prefill(sample.context)
        figures = compare_scores(full, seen, own_chunk_len, chunk_len)
        pairs = seen["own"][f"kept_{KEEP_RATIOS[-1]}"][..., len(prefix_ids) :]
        given |= own_answers(full, pairs, sample.questions, own_chunk_len)
        by_context.append(figures | compare_answers(given, sample.questions))
    return by_context, versions


def take_samples(llm: kvzip.LLM, path: str, context_len: int, num_contexts: int, limit: int) -> list[Sample]:
    """Contexts with at most `limit` questions each, spread evenly."""
    settings = TaskSettings(context_len, lambda text: len(llm.tokenize(text)), num_contexts, path=path)
    found = Squad().samples(settings)
    return [replace(sample, questions=tuple(choose(sample.questions, limit))) for sample in found]


def table(figures: dict[str, list[float]], rows: list[dict[str, Any]]) -> str:
    """What the terminal shows: the worst of each stage, and the answers."""
    ratios = sorted(KEEP_RATIOS, reverse=True)
    lines = [f"{'':60} {'median':>7} {'min':>7}  " + " ".join(f"{r:6}" for r in ratios)]
    for stage, what in STAGES.items():
        if f"{stage}_overlap_{ratios[0]}" in figures:
            ranks = torch.tensor(figures.get(f"{stage}_spearman", []))
            shown = f"{ranks.median():7.4f} {ranks.min():7.4f}" if len(ranks) else f"{'-':>7} {'-':>7}"
            shares = " ".join(f"{min(figures[f'{stage}_overlap_{ratio}']):6.4f}" for ratio in ratios)
            lines.append(f"{what:60} {shown}  {shares}")
    for row in rows:
        scores = "  ".join(f"{name} {row[name][0]:.3f} ± {row[name][1]:.3f}" for name in ("included", "f1"))
        same = "".join(f", {n} of {total} as {other}" for other, (n, total) in row["same"].items())
        lines.append(f"{row['answers']:60} {scores}{same}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-m", "--model", required=True, help="a name of `kvzip models`")
    parser.add_argument("--context-len", type=int, default=2000)
    parser.add_argument("--contexts", type=int, default=1, help="texts of that length")
    parser.add_argument("--limit", type=int, default=40, help="questions a text, at most")
    parser.add_argument("--chunk-len", type=int, help="of both; default: of each its own")
    parser.add_argument("--text", required=True, help="SQuAD JSON")
    parser.add_argument("--json", required=True, help="the result file to write")
    args = parser.parse_args()
    llm = kvzip.load(args.model, dtype="float32")
    samples = take_samples(llm, args.text, args.context_len, args.contexts, args.limit)
    by_context, versions = parity(llm, samples, args.chunk_len or CHUNK_LEN, args.chunk_len or KVPRESS_CHUNK_LEN)
    figures = {name: [v for context in by_context for v in context[name]] for name in by_context[0]}
    rows = answer_rows(by_context)
    print(table(figures, rows))
    longest = max(len(llm.tokenize(sample.context)) for sample in samples)
    more = {"what": "parity", "other": versions, "contexts": len(samples), "stages": STAGES, "answers": rows}
    write_result(report("parity", llm, longest, KEEP_RATIOS[-1], args.text, figures, **more), args.json)


if __name__ == "__main__":
    main()
