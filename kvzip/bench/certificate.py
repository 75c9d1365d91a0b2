"""The measured loss of a context (`kvzip.certificate`) against the loss on real questions, and what measuring costs."""

from __future__ import annotations

from typing import Any

import torch

from kvzip.bench.measure import ratios, report
from kvzip.errors import InputError
from kvzip.eval.fidelity import fidelity, make_reference
from kvzip.eval.tasks.base import Sample, TaskSettings, choose
from kvzip.eval.tasks.squad import Squad
from kvzip.llm import LLM
from kvzip.ops.regression import rank_correlation
from kvzip.options import CompressOptions

NUM_QUESTIONS = 5
LEAST_SHARE = 0.75  # of the length asked for, that a text must have
KEEP_RATIOS = (0.7, 0.5, 0.3, 0.2, 0.1)
CELLS = (
    *(("kvzip", ratio) for ratio in KEEP_RATIOS),
    ("kvzip+refit", 0.5),
    ("kvzip+refit", 0.1),
    ("kvzip+int4", 1.0),
    ("kvzip+int4", 0.3),
    ("snapkv", 0.4),
)


def bench_certificate(llm: LLM, context_len: int, num_texts: int, text_path: str) -> dict[str, Any]:
    """Several texts, each compressed in several ways.

    text_path: SQuAD JSON; each text is of about `context_len` tokens, and its questions measure the true loss: mean
    KL(full || compressed) in nats over the full cache's greedy answers.  Figures: `spearman`, of the certificate's KL
    and the true one over texts and keep ratios of kvzip; `spearman_methods`, over all texts, methods and ratios;
    `spearman_within`, over methods and ratios of each text; `certified_kl` and `true_kl` of each cell, and their ratio;
    `bound_holds`, 1 where the true one is below the bound, else 0; `cost_over_prefill`, of measuring, by the clock.
    Raises InputError for a file with too few texts.
    """
    rows = [row for sample in samples_of(llm, context_len, num_texts, text_path) for row in _measure(llm, sample)]
    plain = [row for row in rows if row["method"] == "kvzip"]
    of_text = [[row for row in rows if row["text"] == text] for text in dict.fromkeys(row["text"] for row in rows)]
    figures = {
        "spearman": [_spearman(plain)],
        "spearman_methods": [_spearman(rows)],
        "spearman_within": [_spearman(some) for some in of_text],
        "certified_kl": [row["certified"] for row in rows],
        "true_kl": [row["true"] for row in rows],
        "certified_over_true": ratios([row["certified"] for row in rows], [row["true"] for row in rows]),
        "bound_holds": [float(row["true"] <= row["bound"]) for row in rows],
        "tokens": [float(row["tokens"]) for row in rows],
        "cost_over_prefill": ratios([row["seconds"] for row in rows], [row["prefill_s"] for row in rows]),
    }
    for row in rows:
        del row["text"]
    return report("certificate", llm, context_len, KEEP_RATIOS[0], text_path, figures, texts=num_texts, rows=rows)


def samples_of(llm: LLM, context_len: int, num_texts: int, text_path: str) -> list[Sample]:
    """Texts of the file, evenly spread over it, none much shorter than the others."""

    def count(text: str) -> int:
        return len(llm.tokenize(text))

    least, settings = LEAST_SHARE * context_len, TaskSettings(context_len, count, 1 << 30, path=text_path)
    found = [s for s in Squad().samples(settings) if s.questions and least <= count(s.context) <= context_len]
    if len(found) < num_texts:
        raise InputError(f"{text_path} has {len(found)} texts of {context_len} tokens: give a longer file, or fewer")
    return choose(found, num_texts)


def _measure(llm: LLM, sample: Sample) -> list[dict[str, Any]]:
    prefilled = llm.prefill(sample.context)
    whole = prefilled.compress(CompressOptions(keep_ratio=1.0, certify=False))
    questions = choose(sample.questions, min(NUM_QUESTIONS, len(sample.questions)))
    references = [make_reference(whole, llm.question_ids(question.text)) for question in questions]
    rows = []
    for method, ratio in CELLS:
        context = prefilled.compress(CompressOptions(keep_ratio=ratio, method=method))
        info = context.data.info
        if info.loss is None:
            raise InputError(
                f"a text of {whole.data.context_len} tokens is too short to be certified: give a longer one"
            )
        true = [fidelity(context, reference).kl for reference in references]
        rows.append(
            {
                "text": sample.context,
                "context_len": whole.data.context_len,
                "method": method,
                "keep_ratio": ratio,
                "true": sum(true) / len(true),
                "certified": info.loss["kl"],
                "bound": info.loss["kl_bound"],
                "agreement": info.loss["agreement"],
                "tokens": info.loss["tokens"],
                "seconds": info.loss["seconds"],
                "prefill_s": info.prefill_s,
            }
        )
    return rows


def _spearman(rows: list[dict[str, Any]]) -> float:
    certified, true = (torch.tensor([row[name] for row in rows]) for name in ("certified", "true"))
    return rank_correlation(certified, true)
