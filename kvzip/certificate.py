"""A measured statement of what a compressed context lost, from parts of its text that the model is made to write again.

The probe is one row of tokens behind the context: what opens the model's turn, and then spans of the text one after
another, each from a place of its own. Both caches are shown it, teacher-forced, side by side in one forward pass, or
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

from kvzip.chunks import equal_parts
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
SPAN_LEN, OPENING_LEN = 10, 3  # tokens of a span, and how many of them open it
MIN_SPANS, MAX_SPANS = 2, 24
CONFIDENCE = 0.95
# one-sided 95% quantiles of Student's t by degrees of freedom, 1 first
T_QUANTILES = (
    6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812, 1.796, 1.782,
    1.771, 1.761, 1.753, 1.746, 1.740, 1.734, 1.729, 1.725, 1.721, 1.717, 1.714,
)  # fmt: skip
ROWS = 36  # tokens compared at a time: two rows of the vocabulary each, and the head's weights are read once for all


@dataclass(frozen=True)
class Probe:
    """What both caches are shown.

    ids: [T] int64.  asked: [n] int64, the tokens of it behind which the next one is foretold.  expected: [n], the
    text's own next tokens.  span_of: [n] int64, which span each belongs to.
    """

    ids: Tensor
    asked: Tensor
    expected: Tensor
    span_of: Tensor


def make_probe(before: Tensor, context_ids: Tensor, num_spans: int) -> Probe:
    """The probe of a text, the same for the same tokens.

    before: [R], what stands before the spans.  context_ids: [S], at least SPAN_LEN.  Each span begins at a random place
    of its own part of the text, these being equally long, and they come in random order.
    """
    starts = _starts(context_ids, num_spans)
    spans = [context_ids[start : start + SPAN_LEN] for start in starts]
    first = torch.arange(num_spans) * SPAN_LEN + len(before)
    asked = first.unsqueeze(1) + torch.arange(OPENING_LEN - 1, SPAN_LEN - 1)
    return Probe(
        ids=torch.cat([before, *spans]),
        asked=asked.flatten(),
        expected=torch.cat([span[OPENING_LEN:] for span in spans]),
        span_of=torch.arange(num_spans).repeat_interleave(SPAN_LEN - OPENING_LEN),
    )


def _starts(context_ids: Tensor, num_spans: int) -> list[int]:
    digest = hashlib.sha256(context_ids.to(torch.int32).numpy().tobytes()).digest()
    rng, last = random.Random(digest), len(context_ids) - SPAN_LEN
    bounds = [last * i // num_spans for i in range(num_spans + 1)]
    starts = [rng.randint(low, high) for low, high in pairwise(bounds)]
    rng.shuffle(starts)
    return starts


def num_spans_within(num_read: int, before_len: int, room: float, head: float) -> int:
    """How many spans a probe may have, at most MAX_SPANS.

    num_read: tokens that are read, to which the cost is held.  room: positions that the model has left.
    head: `head_cost` of the model.
    """
    affordable = MAX_COST / 2 * num_read - before_len / EFFICIENCY
    span_cost = SPAN_LEN / EFFICIENCY + head * (SPAN_LEN - OPENING_LEN)
    return max(0, int(min(affordable / span_cost, (room - before_len) / SPAN_LEN, MAX_SPANS)))


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
        loss = statement(found, self.probe.span_of, self._full_s + time.perf_counter() - started)
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
    before, limit = full.engine.prompts.after, full.engine.geometry.max_positions
    room = math.inf if limit is None else limit - full.length
    affordable = num_spans_within(full.length, len(before), room, head_cost(full.engine.model))
    num_spans = min(affordable, full.context_ids.numel() // SPAN_LEN)
    return make_probe(before, full.context_ids, num_spans) if num_spans >= MIN_SPANS else None


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


def statement(found: Compared, span_of: Tensor, seconds: float) -> dict[str, Any]:
    """What `ContextInfo.loss` holds: the means, and how far that of all spans of the text may be above these'."""
    num_spans = int(span_of.max()) + 1
    by_span = [float(found.kl[span_of == span].mean()) for span in range(num_spans)]
    mean = [float(x.double().mean()) for x in (found.kl, found.same, found.right_full, found.right)]
    return {
        "tokens": len(span_of),
        "spans": num_spans,
        "kl": mean[0],
        "kl_bound": upper_bound(by_span),
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
