"""From a compressed context to the portable layout, which has one count of KV pairs in all heads.

Pairs that were evicted are not in the file: where a head needs some, or the loss has to be measured, the text is read
again, and the ranks in the file say which pairs stay.
"""

from __future__ import annotations

import datetime
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kvzip._version import __version__
from kvzip.certificate import Certifier
from kvzip.compress import FullContext, pack_context
from kvzip.context import RaggedContext
from kvzip.memory import peak_rss_nbytes, release_freed, reset_peak_rss
from kvzip.portable import Origin, PortableContext, count_for, cut, holds, left_out, portable, uniform_mask
from kvzip.progress import Progress, silent
from kvzip.selecting import Selection

if TYPE_CHECKING:
    from kvzip.llm import LLM


def make_portable(
    llm: LLM,
    context: RaggedContext,
    keep_ratio: float | None = None,
    *,
    certify: bool = True,
    progress: Progress = silent,
) -> PortableContext:
    """The portable form of a context of this model: in each head the best pairs by rank.

    keep_ratio: of the context's pairs; None = that of `context`.  certify: measure the loss against the full cache.
    The text is read again, without a replay, unless the context holds all the pairs as plain numbers; then also, if any
    of its pairs is dropped and the loss is to be measured.
    Raises BudgetError, or InputError for a context without ranks or with shared layers, before any work.
    """
    started = time.perf_counter()
    mask = uniform_mask(context, count_for(context, keep_ratio))
    reset_peak_rss()
    own, is_same = context.info, mask.equal(context.keep_mask)
    if holds(context, mask) and (is_same or not certify):
        data, loss, prefill_s = (context, own.loss, 0.0) if is_same else (cut(context, mask), None, 0.0)
    else:
        data, loss, prefill_s = _read_again(llm, context, mask, certify, progress)
    info = replace(
        own,
        method=f"{own.method}, the same count in every head",
        dtype=llm.dtype_name,
        keep_ratio_asked=keep_ratio,
        budget_asked=None,
        keep_ratio=mask.sum().item() / mask.numel(),
        full_kv_nbytes=llm.geometry.kv_nbytes(context.logical_len, llm.model.dtype),
        prefill_s=prefill_s,
        score_s=0.0,
        total_s=time.perf_counter() - started,
        peak_rss_bytes=peak_rss_nbytes(),
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        kvzip_version=__version__,
        loss=loss,
        chosen=None,
    )
    origin = Origin(own.method, own.keep_ratio, context.kv_nbytes, own.loss, left_out(context))
    devices = [layer.device for layer in data.layers]
    inv_freqs = [layer.inv_freq for layer in llm.geometry.layers]
    moved = [f if f is None else f.to(device) for f, device in zip(inv_freqs, devices, strict=True)]
    return portable(data, moved, info, origin)


def _read_again(
    llm: LLM, context: RaggedContext, mask: Tensor, certify: bool, progress: Progress
) -> tuple[RaggedContext, dict[str, Any] | None, float]:
    """The pairs of the mask from a full cache made anew, their measured loss, and the seconds that reading took."""
    full = FullContext(llm.engine(), context.prefix_ids.long(), context.context_ids.long())
    full.prefill(progress=progress)
    certifier = Certifier(full) if certify else None
    release = certifier is None or certifier.let_go(progress)
    data = pack_context(full, Selection(mask, None), context.info, release=release)
    loss = None if certifier is None else certifier.certify(data, progress)
    full.cache.release()
    release_freed()
    return data, loss, full.prefill_s
