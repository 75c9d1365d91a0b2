"""Contexts whose heads keep very different amounts, and what a Hugging Face model answers from them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from conftest import load_real
from torch import Tensor

import kvzip
from kvzip.compress import pack_context
from kvzip.compressed import CompressedContext
from kvzip.context import ContextInfo, RaggedContext
from kvzip.eval.fidelity import Reference, make_reference
from kvzip.integrations.vllm import offline
from kvzip.models.cache import model_folder
from kvzip.selecting import Selection

NEW_TOKENS = 24
TOP = 50
NOISE = 1e-3  # of log-probabilities, float32
BLOCK = 32
SMALL, CHAT, SLIDING = "smollm2-135m", "qwen2.5-coder-0.5b", "gemma3-270m"
PLAIN = ("Name three colours.", "What is the capital of France?")
SHARES = (0.05, 1.0, None, 0.5, "random")  # of its pairs that a head keeps, in turn; None = eight pairs


@dataclass(frozen=True)
class Question:
    """What one request asks.  context: name of the file, or None for a plain prompt.  mode: of the prompt."""

    context: str | None
    text: str
    reference: Reference | None = None


def ragged_context(llm: kvzip.LLM, text: str, seed: int) -> CompressedContext:
    """Of each layer and head another share of the pairs, biases between -1 and 1."""
    full = llm.prefill(text)._full
    num_layers, num_heads = llm.geometry.full_shape
    rng, size = torch.Generator().manual_seed(seed), full.context_ids.numel()
    mask = torch.zeros(num_layers, num_heads, size, dtype=torch.bool)
    for number, row in enumerate(mask.view(-1, size)):
        share = SHARES[number % len(SHARES)]
        share = float(torch.rand(1, generator=rng)) if share == "random" else share
        count = 8 if share is None else max(1, round(float(share) * size))
        row[torch.randperm(size, generator=rng)[:count]] = True
    info = ContextInfo(
        llm.name, llm.fingerprint, "random", "float32", None, None, float(mask.float().mean()), 0, source=f"{seed}"
    )
    data = pack_context(full, Selection(mask, None), info, release=True)
    layers = [layer if layer.window else replace(layer, bias=biases(len(layer.keys), rng)) for layer in data.layers]
    return CompressedContext(llm, replace(data, layers=tuple(layers)))


def biases(count: int, rng: torch.Generator) -> Tensor:
    return torch.rand(count, generator=rng) * 2 - 1


def changed(context: CompressedContext, **layer_fields: Any) -> RaggedContext:
    """The same context with other fields in its full-attention layers."""
    layers = [layer if layer.window else replace(layer, **layer_fields) for layer in context.data.layers]
    return replace(context.data, layers=tuple(layers))


def ask_reference(context: CompressedContext, name: str, question: str, num_tokens: int = NEW_TOKENS) -> Question:
    """The question with the answer of kvzip's own path."""
    ids = context.llm.question_ids(question)
    return Question(name, question, make_reference(context, ids, num_tokens))


def plain_reference(llm: kvzip.LLM, question: str) -> Question:
    """A chat without a context, with the answer of the model's own full cache."""
    head, last = llm.prompts.prefix_ids(), llm.question_ids(question)[len(llm.prompts.template_ids("\n\n")) :]
    ids = torch.tensor([[*head, *last]])
    with torch.inference_mode():
        out = llm.model.generate(
            ids, max_new_tokens=NEW_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    found = out.sequences[0, ids.shape[1] :]
    log_probs = torch.stack([row[0].float().log_softmax(-1) for row in out.logits])
    return Question(None, question, Reference(ids[0], found, log_probs, llm.tokenizer.decode(found)))


@contextmanager
def engine(name: str, store: Path, *, connector: bool = True, **options: Any) -> Iterator[Any]:
    """An engine of a real model that serves the store, or without a connector."""
    for setting, value in (("KVCACHE_SPACE", "1"), ("OMP_THREADS_BIND", "0")):
        os.environ.setdefault(f"VLLM_CPU_{setting}", value)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    limits = {"max_context_bytes": options.pop("max_context_bytes")} if "max_context_bytes" in options else {}
    transfer = {"kv_transfer_config": offline.transfer_config(store, **limits)} if connector else {}
    defaults = {
        "dtype": "float32",
        "enforce_eager": True,
        "block_size": BLOCK,
        "max_model_len": 2048,
        "max_num_seqs": 16,
    }
    with offline.engine(str(model_folder(name)), **transfer, max_logprobs=TOP, **(defaults | options)) as llm:
        yield llm


def in_a_process(what: Callable[..., Any], *given: Any) -> Any:
    """What a function of a module returns in a new process with this one's environment."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes:
        return processes.submit(what, *given).result()


def ask(llm: Any, questions: Sequence[Question], num_tokens: int = NEW_TOKENS, **options: Any) -> list[Any]:
    """Answers to all of them at once: bare questions to contexts, rendered chats without one."""
    tokenizer = llm.get_tokenizer()
    prompts = []
    for question in questions:
        if question.context is None and tokenizer.chat_template:
            chat = [{"role": "user", "content": question.text}]
            prompts.append(list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)))
        else:
            prompts.append(list(tokenizer(question.text, add_special_tokens=False).input_ids))
    asked = [offline.sampling(q.context, num_tokens, "question", logprobs=TOP, **options) for q in questions]
    return offline.generate(llm, prompts, asked)


def error_of(found: Any, reference: Reference) -> float:
    """The largest difference of a log-probability among the likeliest of each step; infinite for other tokens."""
    wanted = reference.answer_ids.tolist()
    if list(found.token_ids)[: len(wanted)] != wanted:  # a reference ends where kvzip's own stop strings end it
        return float("inf")
    worst = 0.0
    for step, own in zip(found.logprobs, reference.log_probs, strict=False):
        tokens = list(step)
        theirs = torch.tensor([step[token].logprob for token in tokens])
        difference = (theirs - own[torch.tensor(tokens)]).abs().max().item()
        worst = max(worst, difference if difference == difference else float("inf"))  # NaN counts as failure
    return worst


def check(answers: Sequence[Any], questions: Sequence[Question]) -> None:
    """Each answer is the reference's, tokens and log-probabilities."""
    errors = [
        error_of(found, q.reference) for found, q in zip(answers, questions, strict=True) if q.reference is not None
    ]
    assert max(errors) < NOISE, errors


@dataclass(frozen=True)
class Case:
    """A model's store.  questions: to contexts `a` and `b`.  plain: without one.  contexts: by name."""

    name: str
    folder: Path
    questions: dict[str, list[Question]]
    plain: list[Question]
    contexts: dict[str, CompressedContext]

    @property
    def mixed(self) -> list[Question]:
        """Two contexts and plain prompts, alternating."""
        return [
            self.questions["a"][0],
            self.plain[0],
            self.questions["b"][0],
            self.questions["b"][1],
            self.questions["a"][1],
        ]


def make_case(name: str, folder: Path, articles: list[dict]) -> Case:
    llm, contexts, questions = load_real(name), {}, {}
    for number, key in enumerate("ab"):
        text = llm.tokenizer.decode(llm.tokenize(articles[number]["text"])[:700])
        contexts[key] = ragged_context(llm, text, seed=number)
        contexts[key].save(folder / f"{key}.kvz")
        questions[key] = [
            ask_reference(contexts[key], key, q) for q, _ in articles[number]["questions"][: 4 if key == "a" else 2]
        ]
    plain = (
        [plain_reference(llm, text) for text in PLAIN] if llm.tokenizer.chat_template else [Question(None, PLAIN[0])]
    )
    return Case(name, folder, questions, plain, contexts)


def suite(llm: Any, case: Case) -> None:
    """Cold and warm, alone and at once, two contexts beside plain prompts."""
    four = case.questions["a"]
    check(ask(llm, four), four)  # cold, at once
    check(ask(llm, four), four)  # warm
    for question in four[:2]:
        check(ask(llm, [question]), [question])
    check(ask(llm, case.mixed), case.mixed)  # the second context is cold
    llm.reset_prefix_cache()
    check(ask(llm, case.mixed), case.mixed)
    check(ask(llm, case.plain), case.plain)
