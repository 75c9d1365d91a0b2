"""Layers that use the keys and values of another one (KVSharer): found once per model, kept in the cache folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedTokenizerBase

from kvzip.compress import Engine
from kvzip.errors import InputError, ModelError
from kvzip.hf.geometry import Geometry
from kvzip.hf.prefill import PrefillCache, forward_at
from kvzip.ops.sharing import THRESHOLD, Shared, by_distance, mean_states, search_shared
from kvzip.profilers import SHARING
from kvzip.profiles import find_profile, write_profile
from kvzip.progress import Progress, silent

NUM_SENTENCES, SENTENCE_LEN = 30, 64  # as in the paper; here each passage has exactly that many tokens
DEFAULT_SHARE = 8  # of so many full-attention layers, one is shared: the authors' 4 of 32


def passages(tokenizer: PreTrainedTokenizerBase, text: str) -> list[Tensor]:
    """Up to 30 passages of 64 token ids each, which begin at sentences and overlap where the text is short.

    Raises InputError for a text with fewer tokens.
    """
    starts = [0, *(match.end() for match in re.finditer(r"[.!?]\s+", text))]
    found = []
    for start in starts:
        ids = tokenizer(text[start:], split_special_tokens=True, truncation=True, max_length=SENTENCE_LEN).input_ids
        if len(ids) == SENTENCE_LEN:
            found.append(torch.tensor(ids, dtype=torch.int64))
    if not found:
        raise InputError(f"the text is too short to calibrate kvsharer: give at least {SENTENCE_LEN} tokens")
    step = max(1, len(found) // NUM_SENTENCES)
    return found[::step][:NUM_SENTENCES]


@torch.inference_mode()
def find_shared_layers(
    engine: Engine,
    texts: Sequence[Tensor],
    num_layers: int | None = None,
    threshold: float = THRESHOLD,
    *,
    progress: Progress = silent,
) -> Shared:
    """Layers to share, each with its source: least similar first, kept where the model still puts out much the same.

    texts: ids [T], all of one length.  num_layers: how many, at most; by default an eighth of the full-attention
    layers.  The similarity is the cosine of the final hidden states with and without sharing, flattened, averaged over
    the texts.  Raises InputError for a number that is out of range.
    """
    full = engine.geometry.full_layers
    num_layers = max(1, len(full) // DEFAULT_SHARE) if num_layers is None else num_layers
    if not 0 <= num_layers < len(full):
        raise InputError(f"num_layers {num_layers} is out of range: this model can share 0 to {len(full) - 1} layers")
    outputs: list[Tensor] = []
    states = mean_states(_caches(engine, texts, outputs))
    by_layer = dict(zip(full, states, strict=True))
    pairs = [(i, j) for i in full for j in full if engine.geometry.can_share(i, j)]
    tried = 0

    def similarity(shared: Shared) -> float:
        nonlocal tried
        tried += 1
        progress("calibrate", tried, len(pairs))
        ours = (_hidden(engine, engine.geometry.sharing(shared), ids)[0] for ids in texts)
        return sum(_cosine(a, b) for a, b in zip(outputs, ours, strict=True)) / len(outputs)

    return search_shared(by_distance(pairs, by_layer), num_layers, similarity, threshold)


def _caches(engine: Engine, texts: Sequence[Tensor], outputs: list[Tensor]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Keys and values of the full-attention layers after each text; its final hidden states go to `outputs`."""
    for ids in texts:
        hidden, cache = _hidden(engine, engine.geometry, ids)
        outputs.append(hidden)
        layers = (cache.stored[i].read(slice(None)) for i in engine.geometry.full_layers)
        yield [(keys[0], values[0]) for keys, values in layers]


def _hidden(engine: Engine, geometry: Geometry, ids: Tensor) -> tuple[Tensor, PrefillCache]:
    cache = PrefillCache(geometry, ids.numel(), engine.backend)
    return forward_at(engine.model, ids, 0, cache).float().flatten(), cache


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(cosine_similarity(a, b, dim=0))


def save_shared_layers(fingerprint: str, shared: Shared, source: str) -> Path:
    """Store the map of a model and the name of the text it came from."""
    return write_profile(SHARING, fingerprint, {"shared": sorted(shared.items())}, source)


def load_shared_layers(fingerprint: str, geometry: Geometry) -> Shared:
    """The map of a model. Raises ModelError where there is none that fits, naming the command that makes one."""
    path, remedy = find_profile(SHARING, fingerprint)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        owner, pairs = content["fingerprint"], content["shared"]
        shared = {layer: source for layer, source in pairs if type(layer) is type(source) is int}
        geometry.sharing(shared)
    except (OSError, ValueError, KeyError, TypeError, ModelError) as error:
        raise ModelError(f"the kvsharer profile {path} can't be used ({error}): {remedy}") from error
    if owner != fingerprint or len(shared) != len(pairs):
        raise ModelError(f"the kvsharer profile {path} does not fit this model: {remedy}")
    return shared
