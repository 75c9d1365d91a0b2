"""How near a compressed cache is to the full one, without labels: on answers, and on repeating the text.

The full cache's own greedy answer is the reference. Teacher-forced, both caches see the same tokens, so that one early
difference does not make everything after it differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvzip.compress import CHUNK_LEN, chunk_slices
from kvzip.generation import Clock, check_positions
from kvzip.hf.cache import SessionCache
from kvzip.llm import LLM, CompressedContext

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
    (found,) = answer_ids(full, [prompt_ids], max_new_tokens)
    ids, answer = torch.tensor([*prompt_ids, *found[:-1]]), torch.tensor(found)
    return Reference(ids, answer, answer_log_probs(full, ids, len(found)), full.llm.generator.text(found))


def answer_ids(context: CompressedContext, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
    """The tokens of the greedy answer to each prompt, end token included, as one batch. Raises ContextLengthError."""
    llm = context.llm
    check_positions(context.data.logical_len, max(map(len, prompts)), max_new_tokens, llm.max_positions)
    return llm.generator.run_batch(context.cache(), prompts, max_new_tokens, Clock(), {})


def fidelity(context: CompressedContext, reference: Reference) -> Fidelity:
    """How a compressed context of the same text answers."""
    expected = reference.log_probs
    found = answer_log_probs(context, reference.ids, len(expected))
    answer = reference.answer_ids.unsqueeze(1)
    same = found.argmax(-1) == reference.answer_ids
    return Fidelity(
        kl=float((expected.exp() * (expected - found)).sum(-1).mean()),
        top1=float(same.float().mean()),
        log_prob_change=float((found.gather(1, answer) - expected.gather(1, answer)).sum()),
        same_answer=bool(same.all()),
    )


@torch.inference_mode()
def answer_log_probs(context: CompressedContext, ids: Tensor, last: int) -> Tensor:
    """[last, V] float32 on the CPU: log-probabilities after each of the last tokens of `ids` [n] behind the context."""
    model = context.llm.model
    cache = SessionCache(context.data, context.llm.backend)
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
