"""What is learned of a model once, from one text: a profiler watches as a scorer does, and ends in a profile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from kvzip.errors import InputError, UnknownNameError
from kvzip.ops.attention import column_max, mass_between
from kvzip.scorers.base import Observation, Observer, Profile, Reading, Shape

PASSAGE_LEN = 1024  # tokens of the passage that is repeated for `duo`


class Profiler(Observer):
    """values: what `profile` returns, by name, and how many of the dims (Lf, Hkv) each has; finite and not negative."""

    values: ClassVar[Mapping[str, int]] = {}

    @classmethod
    def passage(cls, context_ids: Tensor) -> Tensor:
        """What is to be read of a text [S]: by default, all of it. Raises InputError where it is too short."""
        return context_ids

    def profile(self) -> Profile:
        """What was learned, float32 on the CPU."""
        raise NotImplementedError


class HeadProfiler(Profiler):
    """head_scores: the largest attention weight that a pair of the head gets while the text is repeated.

    Source: KVzip's context-independent eviction (arXiv 2505.23416).
    """

    needs = frozenset({"replay_queries"})
    values: ClassVar[Mapping[str, int]] = {"head_scores": 2}

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self._best = torch.zeros(shape[:2])

    def observe(self, layer: int, observation: Observation) -> None:
        obs = observation
        best = column_max(obs.query, obs.chunk_keys, obs.lse, scale=obs.scale, softcap=obs.softcap).amax(dim=-1)
        self._best[layer] = torch.maximum(self._best[layer], best.cpu())

    def profile(self) -> Profile:
        return {"head_scores": self._best}


class BaklavaProfiler(Profiler):
    """head_importance: 1 - cos(v, o), v a token's own value and o what a query head puts out for it; mean over tokens
    and the query heads of a KV head.  layer_importance: 1 - cos(x, x + a), x the residual stream that enters the layer
    and a the projected output of its attention, before a norm that some families put behind it; mean over tokens.

    Both lie in [0, 2]. Source: BaKlaVa (arXiv 2502.13176), whose formulas could not be read: see docs/decisions.md.
    """

    needs = frozenset({"prefill_queries", "attention_outputs"})
    values: ClassVar[Mapping[str, int]] = {"head_importance": 2, "layer_importance": 1}

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self._heads = torch.zeros(shape[:2], dtype=torch.float64)
        self._layers = torch.zeros(shape[0], dtype=torch.float64)

    def watch(self, layer: int, reading: Reading) -> None:
        values, outputs, stream, weights = reading.values, reading.outputs, reading.stream, reading.output_weights
        assert values is not None and outputs is not None and stream is not None and weights is not None
        groups = len(outputs) // len(values)
        changes = 1 - cosine_similarity(values.repeat_interleave(groups, dim=0).float(), outputs.float(), dim=-1)
        self._heads[layer] += changes.double().sum(dim=-1).reshape(len(values), groups).mean(dim=-1).cpu()
        before = stream.float()
        after = before.clone()
        for output, weight in zip(outputs, weights, strict=True):
            after += output.float() @ weight.float()
        self._layers[layer] += (1 - cosine_similarity(before, after, dim=-1)).double().sum().cpu()

    def profile(self) -> Profile:
        means = {"head_importance": self._heads / self.shape[2], "layer_importance": self._layers / self.shape[2]}
        return {name: mean.clamp_min(0).float() for name, mean in means.items()}


class DuoProfiler(Profiler):
    """retrieval_scores: the attention that a streaming head could not pay, in [0, 1].

    The tokens of the text are put into a random order, always the same one for the same number, and read twice. What
    the second copy attends to beyond prefix, `NUM_SINKS` and the last `NUM_RECENT` tokens is averaged over its tokens
    and the query heads of a KV head. Only the first copy tells what comes next, so heads that retrieve look back.
    A stand-in of ours for the trained gates of DuoAttention (arXiv 2410.10819).
    """

    needs = frozenset({"window_queries"})
    values: ClassVar[Mapping[str, int]] = {"retrieval_scores": 2}
    NUM_SINKS, NUM_RECENT = 64, 256  # the defaults of the budget

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self._mass = torch.zeros(shape[:2], dtype=torch.float64)

    @classmethod
    def passage(cls, context_ids: Tensor) -> Tensor:
        least = cls.NUM_SINKS + cls.NUM_RECENT
        length = min(PASSAGE_LEN, context_ids.numel())
        if length <= least:
            raise InputError(f"the text has {length} tokens, too few to calibrate `duo`: give more than {least}")
        order = torch.randperm(length, generator=torch.Generator().manual_seed(0))
        return context_ids[:length][order].repeat(2)

    @property
    def num_queries(self) -> int:
        return self.shape[2] // 2

    def watch(self, layer: int, reading: Reading) -> None:
        first = reading.prefix_len + self.NUM_SINKS
        mass = mass_between(
            reading.query, reading.keys, reading.lse, first, self.NUM_RECENT,
            scale=reading.scale, softcap=reading.softcap,
        )  # fmt: skip
        by_head = mass.double().sum(dim=-1).reshape(reading.keys.shape[0], -1).mean(dim=-1)
        self._mass[layer] += by_head.cpu()

    def profile(self) -> Profile:
        return {"retrieval_scores": (self._mass / self.num_queries).float()}


DISTILLED = "distilled"  # a kind of profile that is fitted to several texts: `kvzip.distill`
SHARING = "kvsharer"  # a kind of profile that needs several passes of the model: `kvzip.sharing`
PROFILERS: dict[str, type[Profiler]] = {"baklava": BaklavaProfiler, "duo": DuoProfiler, "head": HeadProfiler}


def get_profiler(kind: str) -> type[Profiler]:
    """The profiler of that kind of profile. Raises UnknownNameError."""
    if kind not in PROFILERS:
        raise UnknownNameError.of("profile", kind, {*PROFILERS, SHARING})
    return PROFILERS[kind]
