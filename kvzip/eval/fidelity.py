"""How near a compressed cache is to the full one, without labels: on answers, and on repeating the text.

The full cache's own greedy answer is the reference. Teacher-forced, both caches see the same tokens, so that one early
difference does not make everything after it differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvzip.chunks import CHUNK_LEN, chunk_slices
from kvzip.compressed import CompressedContext
from kvzip.generation import Clock, check_positions
from kvzip.hf.cache import SessionCache
from kvzip.llm import LLM

ANSWER_TOKENS = 16


@dataclass(frozen=True)
class Reference:
    """The full cache's greedy answer to a question.

    ids: [n] int64, the question and its answer but the last token.  answer_ids: the m tokens of the answer.
    log_probs: [m, V] float32, the full cache's at each of them.  text: the answer.
    """

    ids: Tensor
    answer_ids: Tensor
    log_probs: Tensor
    text: str


@dataclass(frozen=True)
class Fidelity:
    """One answer under a compressed cache.

    kl: mean KL(full || compressed) a token, in nats.  top1: share of tokens that stay the likeliest.
    log_prob_change: of the whole answer, in nats, negative = less likely.  same_answer: greedy decoding gives it too.
    """

    kl: float
    top1: float
    log_prob_change: float
    same_answer: bool


def make_reference(
    full: CompressedContext, prompt_ids: Sequence[int], max_new_tokens: int = ANSWER_TOKENS
) -> Reference:
    """The reference answer.  full: a context at keep ratio 1.  prompt_ids: what stands behind it, `llm.question_ids`.

    Raises ContextLengthError where the model's positions do not suffice.
    """
    found = answer_ids(full, prompt_ids, max_new_tokens)
    ids, answer = torch.tensor([*prompt_ids, *found[:-1]]), torch.tensor(found)
    return Reference(ids, answer, answer_log_probs(full, ids, len(found)), full.llm.generator.text(found))


def answer_ids(context: CompressedContext, prompt_ids: Sequence[int], max_new_tokens: int) -> list[int]:
    """The tokens of the greedy answer, end token included. Raises ContextLengthError."""
    llm = context.llm
    check_positions(context.data.logical_len, len(prompt_ids), max_new_tokens, llm.max_positions)
    return llm.generator.run(context.cache(), torch.tensor([prompt_ids]), None, max_new_tokens, Clock(), {})[0]


def fidelity(context: CompressedContext, reference: Reference) -> Fidelity:
    """How a compressed context of the same text answers."""
    return _compare(answer_log_probs(context, reference.ids, len(reference.log_probs)), reference)


def answered(context: CompressedContext, reference: Reference, max_new_tokens: int) -> tuple[Fidelity, list[int]]:
    """`fidelity`, and the tokens of the context's own greedy answer, end token included.

    Up to the first token that differs both answers are the same, so only what follows is decoded.
    """
    cache, generator, num_known = context.cache(), context.llm.generator, len(reference.answer_ids)
    found = answer_log_probs(context, reference.ids, num_known, cache)
    choice = found.argmax(-1)
    agreed = int((choice == reference.answer_ids).cumprod(0).sum())
    answer = choice[: agreed + 1].tolist()
    if agreed < num_known and answer[-1] not in generator.end_ids and len(answer) < max_new_tokens:
        before = len(reference.ids) - (num_known - 1) + agreed  # tokens of the question and of what is agreed
        cache.rewind(before)
        ids = torch.cat([reference.ids[:before], choice[agreed : agreed + 1]])
        answer += generator.run(cache, ids[None], None, max_new_tokens - len(answer), Clock(), {})[0]
    return _compare(found, reference), answer


def _compare(found: Tensor, reference: Reference) -> Fidelity:
    """found: [m, V] float32, log-probabilities at each token of the reference answer."""
    expected = reference.log_probs
    answer = reference.answer_ids.unsqueeze(1)
    same = found.argmax(-1) == reference.answer_ids
    return Fidelity(
        kl=float((expected.exp() * (expected - found)).sum(-1).mean()),
        top1=float(same.float().mean()),
        log_prob_change=float((found.gather(1, answer) - expected.gather(1, answer)).sum()),
        same_answer=bool(same.all()),
    )


@torch.inference_mode()
def answer_log_probs(context: CompressedContext, ids: Tensor, last: int, cache: SessionCache | None = None) -> Tensor:
    """[last, V] float32 on the CPU: log-probabilities after each of the last tokens of `ids` [n] behind the context.

    cache: an empty one of the context, to go on with.
    """
    model = context.llm.model
    cache = context.cache() if cache is None else cache
    logits = model(ids.to(model.device)[None], past_key_values=cache, logits_to_keep=last).logits
    return torch.log_softmax(logits[0].float(), dim=-1).cpu()


@torch.inference_mode()
def reconstruction(context: CompressedContext, chunk_len: int = CHUNK_LEN) -> float:
    """The share of the text's tokens that the model predicts first when it is asked to repeat the text, chunk by chunk.

    Each chunk is asked for with the words that scoring uses, and its own tokens are given up to the one predicted.
    """
    ids = context.data.context_ids.long()
    right = 0
    for chunk in chunk_slices(len(ids), chunk_len):
        right += _predicted(context.llm, context, ids, chunk)
    return right / len(ids)


def _predicted(llm: LLM, context: CompressedContext, ids: Tensor, chunk: slice) -> int:
    prompt = llm.engine().prompts.before(ids, chunk.start)
    cache, count = SessionCache(context.data, llm.backend), chunk.stop - chunk.start
    asked = torch.cat([prompt, ids[chunk]])[:-1].to(llm.model.device)
    hidden = llm.model.get_decoder()(asked[None], past_key_values=cache).last_hidden_state[0, -count:]
    head = llm.model.get_output_embeddings()
    found = torch.cat([head(part).argmax(-1) for part in hidden.split(256)]).cpu()  # the vocabulary is long
    return int((found == ids[chunk]).sum())
