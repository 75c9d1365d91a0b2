"""A measured statement of what a compressed context lost, from parts of its text that the model is made to write again.

The probe is one row of tokens behind the context: what opens the model's turn, and then spans of the text one after
another, each from a place of its own; of a text that is long enough, also turns that quote a few words and ask what
follows them, with the answer. Both caches are shown it, teacher-forced, side by side in one forward pass, or
in one each where the full cache has to give way first. The first tokens of a span say which place is meant; at the
others the distributions of the next token are compared.
"""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kvzip.chunks import Asking, equal_parts
from kvzip.compress import Engine, FullContext
from kvzip.context import RaggedContext
from kvzip.hf.cache import SessionCache
from kvzip.hf.head import head_cost, log_probs
from kvzip.hf.pair import hidden_behind_both
from kvzip.hf.prefill import forward_at, hidden_behind
from kvzip.progress import Progress, silent

MAX_COST = 0.25  # of the prefill, for both caches
BOTH_LEN = 4096  # tokens of prefix and context up to which both caches may be held at a time
EFFICIENCY = 0.6  # of a pass over few tokens, against one over a block of the prefill: measured, docs/log.md
SPAN_LEN, OPENING_LEN = 8, 2  # tokens of a span, and how many of them open it
QUOTE_LEN, ANSWER_LEN = 6, 6  # tokens of the text that a made question quotes, and that follow them
MIN_SPANS, MAX_SPANS = 2, 24
MIN_QUESTIONS, MAX_QUESTIONS = 2, 6
QUESTION_SHARE = 0.5  # of what a probe may cost, at most
CONFIDENCE = 0.95
# one-sided 95% quantiles of Student's t by degrees of freedom, 1 first
T_QUANTILES = (
    6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812, 1.796, 1.782, 1.771, 1.761, 1.753,
    1.746, 1.740, 1.734, 1.729, 1.725, 1.721, 1.717, 1.714, 1.711, 1.708, 1.706, 1.703, 1.701, 1.699,
)  # fmt: skip
ROWS = 36  # tokens compared at a time: two rows of the vocabulary each, and the head's weights are read once for all


@dataclass(frozen=True)
class Probe:
    """What both caches are shown.

    ids: [T] int64.  asked: [n] int64, the tokens of it behind which the next one is foretold.  expected: [n], the
    text's own next tokens.  item_of: [n] int64, which span or question each belongs to, spans first.  num_questions:
    how many of these are made questions.
    """

    ids: Tensor
    asked: Tensor
    expected: Tensor
    item_of: Tensor
    num_questions: int


def make_probe(
    before: Tensor, context_ids: Tensor, num_spans: int, asking: Asking | None = None, num_questions: int = 0
) -> Probe:
    """The probe of a text, the same for the same tokens.

    before: [R], what stands before the spans.  context_ids: [S], at least SPAN_LEN, with questions at least as many
    tokens as these quote and answer.  asking: what stands around the quotes of questions.  Spans, and questions too,
    begin at a random place each of its own part of the text, these being equally long, and come in random order.
    """
    rows, asked, expected = [before], list[Tensor](), list[Tensor]()

    def add(shown: Sequence[Tensor], answer: Tensor) -> None:
        rows.extend([*shown, answer])
        first = sum(len(row) for row in rows) - len(answer) - 1  # what foretells the first token of the answer
        asked.append(torch.arange(first, first + len(answer)))
        expected.append(answer)

    rng = random.Random(hashlib.sha256(context_ids.to(torch.int32).numpy().tobytes()).digest())
    for start in _starts(rng, len(context_ids) - SPAN_LEN, num_spans):
        span = context_ids[start : start + SPAN_LEN]
        add([span[:OPENING_LEN]], span[OPENING_LEN:])
    if asking is not None:
        for start in _starts(rng, len(context_ids) - QUOTE_LEN - ANSWER_LEN, num_questions):
            quote, answer = context_ids[start:][:QUOTE_LEN], context_ids[start + QUOTE_LEN :][:ANSWER_LEN]
            add([asking.before, quote, asking.after], answer)
    item_of = torch.cat([torch.full((len(answer),), number) for number, answer in enumerate(expected)])
    return Probe(torch.cat(rows), torch.cat(asked), torch.cat(expected), item_of, num_questions)


def _starts(rng: random.Random, last: int, count: int) -> list[int]:
    """So many places from 0 to `last`, one of each equal part, in random order."""
    bounds = [last * i // count for i in range(count + 1)] if count else []
    starts = [rng.randint(low, high) for low, high in pairwise(bounds)]
    rng.shuffle(starts)
    return starts


def probe_size(
    num_read: int, before_len: int, room: float, head: float, asking_len: int | None = None
) -> tuple[int, int]:
    """How many spans and made questions a probe may have.

    num_read: tokens that are read, to which the cost is held.  room: positions that the model has left.
    head: `head_cost` of the model.  asking_len: tokens around the quote of a question; None = no questions.
    """
    affordable, place = MAX_COST / 2 * num_read - before_len / EFFICIENCY, room - before_len
    num_questions = question_cost = question_len = 0.0
    if asking_len is not None:
        question_len = asking_len + QUOTE_LEN + ANSWER_LEN
        question_cost = question_len / EFFICIENCY + head * ANSWER_LEN
        fit = min(affordable / question_cost, place / question_len) * QUESTION_SHARE
        num_questions = min(int(max(0.0, fit)), MAX_QUESTIONS)
        num_questions = num_questions if num_questions >= MIN_QUESTIONS else 0
    span_cost = SPAN_LEN / EFFICIENCY + head * (SPAN_LEN - OPENING_LEN)
    left = (affordable - num_questions * question_cost) / span_cost, (place - num_questions * question_len) / SPAN_LEN
    return max(0, int(min(*left, MAX_SPANS))), int(num_questions)


class Certifier:
    """Measures any number of compressed contexts of one text against its full cache.

    Where the full cache has to be given back before, `ask_full` asks it alone: of its answer the final hidden states
    [n, E] are kept, nothing of the length of the context or of the vocabulary.
    """

    def __init__(self, full: FullContext) -> None:
        self.full, self._found, self._full_s = full, torch.empty(0), 0.0

    @cached_property
    def probe(self) -> Probe | None:
        """What both caches are shown; None where there is no room for it."""
        return probe_of(self.full)

    def let_go(self, progress: Progress = silent) -> bool:
        """Whether packing may give the full cache back before `certify`.

        That of a long text is asked now, alone; that of a short one stays, to be asked beside what becomes of it.
        """
        if self.full.length > BOTH_LEN:
            self.ask_full(progress)
        return self.probe is None or bool(self._found.numel())

    def ask_full(self, progress: Progress = silent) -> None:
        """Show the probe to the full cache alone, where that was not done yet."""
        if self.probe is None or self._found.numel():
            return
        started = time.perf_counter()
        progress("certify", 0, 2 * len(self.probe.ids))
        with torch.inference_mode():
            hidden = hidden_behind(self.full.engine.model, self.probe.ids, self.full.cache)
        self._found = hidden[self.probe.asked.to(hidden.device)].clone()
        self._full_s = time.perf_counter() - started

    def certify(self, context: RaggedContext, progress: Progress = silent) -> dict[str, Any] | None:
        """The statement of a context of this text.

        None where the text is too short for one, or where the model's own numbers are not finite.
        """
        if self.probe is None:
            return None
        started, num_tokens = time.perf_counter(), len(self.probe.ids)
        progress("certify", num_tokens if self._found.numel() else 0, 2 * num_tokens)
        with torch.inference_mode():
            found = compare(self.full.engine, *self._hidden(self.probe, context), self.probe.expected)
        progress("certify", 2 * num_tokens, 2 * num_tokens)
        loss = statement(found, self.probe, self._full_s + time.perf_counter() - started)
        return loss if math.isfinite(loss["kl"]) else None

    def _hidden(self, probe: Probe, context: RaggedContext) -> tuple[Tensor, Tensor]:
        """The final hidden states [n, E] of the full and of the compressed cache where something is asked."""
        engine = self.full.engine
        model, session = engine.model, SessionCache(context, engine.backend)
        asked = probe.asked.to(model.device)
        if self._found.numel():
            return self._found, forward_at(model, probe.ids, 0, session)[asked]
        full, compressed = hidden_behind_both(model, probe.ids, self.full.cache, session)
        return full[asked], compressed[asked]


def probe_of(full: FullContext) -> Probe | None:
    """The longest probe that costs at most MAX_COST of the prefill; None where that is too short to say anything."""
    engine, length = full.engine, full.context_ids.numel()
    before, asking, limit = engine.prompts.after, engine.asking, engine.geometry.max_positions
    room = math.inf if limit is None else limit - full.length
    asking_len = None if asking is None else len(asking.before) + len(asking.after)
    num_spans, num_questions = probe_size(full.length, len(before), room, head_cost(engine.model), asking_len)
    num_spans = min(num_spans, length // SPAN_LEN)
    return make_probe(before, full.context_ids, num_spans, asking, num_questions) if num_spans >= MIN_SPANS else None


@dataclass(frozen=True)
class Compared:
    """Both caches at each of n tokens, on the CPU.

    kl: [n] float64, KL(full || compressed) in nats.  same: [n] bool, the likeliest token is the same.  right_full,
    right: [n] bool, the likeliest token of the full, the compressed cache is the text's own.
    """

    kl: Tensor
    same: Tensor
    right_full: Tensor
    right: Tensor


def compare(engine: Engine, full: Tensor, compressed: Tensor, expected: Tensor) -> Compared:
    """full, compressed: final hidden states [n, E].  expected: [n], the text's own tokens."""
    columns: list[list[Tensor]] = [[], [], [], []]
    for part in equal_parts(slice(0, len(expected)), ROWS):
        first, second = log_probs(engine.model, torch.cat([full[part], compressed[part]])).chunk(2)
        best, other, own = first.argmax(-1).cpu(), second.argmax(-1).cpu(), expected[part]
        kl = torch.linalg.vecdot(first.exp(), first.sub_(second)).double().cpu()
        for column, values in zip(columns, (kl.clamp_min(0), best == other, best == own, other == own), strict=True):
            column.append(values)
    return Compared(*map(torch.cat, columns))


def statement(found: Compared, probe: Probe, seconds: float) -> dict[str, Any]:
    """What `ContextInfo.loss` holds: the means, and how far that of all such items of the text may be above these'."""
    num_items = int(probe.item_of.max()) + 1
    by_item = [float(found.kl[probe.item_of == item].mean()) for item in range(num_items)]
    mean = [float(x.double().mean()) for x in (found.kl, found.same, found.right_full, found.right)]
    made = by_item[num_items - probe.num_questions :]
    return {
        "tokens": len(probe.item_of),
        "spans": num_items - probe.num_questions,
        "questions": probe.num_questions,
        "kl": mean[0],
        **({"kl_questions": sum(made) / len(made)} if made else {}),
        "kl_bound": upper_bound(by_item),
        "confidence": CONFIDENCE,
        "agreement": mean[1],
        "repeated_full": mean[2],
        "repeated": mean[3],
        "seconds": seconds,
    }


def upper_bound(values: Sequence[float]) -> float:
    """One-sided 95% upper confidence limit of the mean that `values`, at least two, were drawn from, by Student's t."""
    count = len(values)
    mean = sum(values) / count
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    return mean + T_QUANTILES[count - 2] * deviation / math.sqrt(count)
