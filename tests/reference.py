"""Slow, obvious oracles: full attention with explicit masks, and scores written straight from the paper.

They use an attention function of their own, transformers' DynamicCache, and no kvzip code.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PreTrainedModel

NAME = "kvzip_test_reference"


@dataclass
class State:
    """evicted: layer -> [Hkv or 1, S] bool, True = may not be attended to.  seen: layer -> (query, keys) of the last call."""

    evicted: dict[int, Tensor] = field(default_factory=dict)
    seen: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


STATE = State()


def attention(
    module, query, key, value, attention_mask=None, scaling=None, softcap=None, sliding_window=None, **kwargs
):
    """Everything at once in float32: logits, soft cap, causal and window masks by index, evicted pairs, softmax."""
    num_heads, q_len, head_dim = query.shape[1:]
    groups = num_heads // key.shape[1]
    keys, values = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    logits = query @ keys.transpose(2, 3) * (scaling if scaling is not None else head_dim**-0.5)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    kv_len = key.shape[2]
    rows = torch.arange(kv_len - q_len, kv_len).unsqueeze(1)
    columns = torch.arange(kv_len)
    allowed = columns <= rows
    if sliding_window is not None:
        allowed &= columns > rows - sliding_window
    logits = logits.masked_fill(~allowed, -torch.inf)
    evicted = STATE.evicted.get(module.layer_idx)
    if evicted is not None:
        hidden = torch.zeros(key.shape[1], kv_len, dtype=torch.bool)
        hidden[:, : evicted.shape[1]] = evicted  # [Hkv or 1, S]
        logits = logits.masked_fill(hidden.repeat_interleave(groups, 0)[None, :, None], -torch.inf)
    STATE.seen[module.layer_idx] = (query, key)
    out = torch.softmax(logits, dim=-1) @ values
    return out.transpose(1, 2).contiguous(), None


class Reference:
    """`model` with the reference attention for as long as the `with` block lasts."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.known: tuple[Tensor, DynamicCache] | None = None

    def __enter__(self) -> Reference:
        AttentionInterface.register(NAME, attention)
        self.before = self.model.config._attn_implementation
        self.model.set_attn_implementation(NAME)
        return self

    def __exit__(self, *exc: object) -> None:
        self.model.set_attn_implementation(self.before)
        STATE.evicted.clear()
        STATE.seen.clear()

    @torch.inference_mode()
    def logits(self, ids: Tensor, last: int, evicted: dict[int, Tensor] | None = None, split: int = 0) -> Tensor:
        """[last, V] logits of the last tokens of `ids` [T].

        evicted: pairs that the tokens from `split` on may not attend to; the first `split` tokens see everything, and
        their cache is kept for the next call with the same first tokens.
        """
        STATE.evicted.clear()
        cache = self._read(ids[:split]) if split else DynamicCache()
        STATE.evicted.update(evicted or {})
        logits = self.model(ids[None, split:], past_key_values=cache, logits_to_keep=last).logits[0]
        if split:
            cache.crop(split - len(ids))
        return logits

    def _read(self, ids: Tensor) -> DynamicCache:
        if self.known is None or not torch.equal(self.known[0], ids):
            self.known = (ids, DynamicCache())
            self.model(ids[None], past_key_values=self.known[1], logits_to_keep=1)
        return self.known[1]

    @torch.inference_mode()
    def scores(
        self,
        prefix: Tensor,
        context: Tensor,
        replays: list[tuple[slice, Tensor]],
        full_layers: tuple[int, ...],
        scale_of=None,
        softcap: float | None = None,
        local: bool = False,
    ) -> Tensor:
        """[Lf, Hkv, S]: per chunk one forward over prefix + context + replay, softmax over prefix + chunk + replay keys.

        replays: (chunk, ids that repeat it).  scale_of: layer -> softmax scale, None = 1/sqrt(D).  local: the replay
        sees nothing of the other chunks.
        """
        rows = []
        whole = torch.cat([prefix, context])
        for chunk, ids in replays:
            cache = self._read(whole)
            others = torch.ones(1, len(whole), dtype=torch.bool)
            others[:, : len(prefix)] = False
            others[:, len(prefix) + chunk.start : len(prefix) + chunk.stop] = False
            STATE.evicted.update(dict.fromkeys(full_layers, others) if local else {})
            self.model(ids[None], past_key_values=cache, logits_to_keep=1)
            STATE.evicted.clear()
            cache.crop(-len(ids))
            rows.append(
                torch.stack(
                    [self._chunk_scores(i, len(prefix), chunk, len(ids), scale_of, softcap) for i in full_layers]
                )
            )
        return torch.cat(rows, dim=-1)

    @torch.inference_mode()
    def weights(
        self, ids: Tensor, full_layers: tuple[int, ...], scale_of, softcap: float | None = None
    ) -> dict[int, Tensor]:
        """[Hq, T, T] a layer: the causal attention of `ids` [T] to themselves, all at once."""
        self.model(ids[None], past_key_values=DynamicCache(), logits_to_keep=1)
        found = {}
        for layer in full_layers:
            query, keys = (t[0].float() for t in STATE.seen[layer])
            logits = query @ keys.repeat_interleave(len(query) // len(keys), 0).transpose(1, 2) * scale_of(layer)
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            future = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
            found[layer] = torch.softmax(logits.masked_fill(future, -torch.inf), dim=-1)
        return found

    @torch.inference_mode()
    def plus_scores(
        self,
        prefix: Tensor,
        context: Tensor,
        replays: list[tuple[slice, Tensor]],
        full_layers: tuple[int, ...],
        scale_of,
        softcap: float | None = None,
        power: float = 1.0,
    ) -> Tensor:
        """[Lf, Hkv, S] of KVzip+: weights times (|W_O v| of each query head, over |h| of each query) to a power, then the
        largest."""
        inputs, rows = {}, []
        modules = {m.layer_idx: m for m in self.model.modules() if hasattr(m, "o_proj")}
        handles = [
            module.register_forward_pre_hook(
                lambda _, args, kwargs, layer=layer: inputs.update({layer: kwargs["hidden_states"][0]}),
                with_kwargs=True,
            )
            for layer, module in modules.items()
        ]
        for chunk, ids in replays:
            cache = self._read(torch.cat([prefix, context]))
            self.model(ids[None], past_key_values=cache, logits_to_keep=1)
            kept = []
            for layer in full_layers:
                weights = self._chunk_weights(layer, len(prefix), chunk, len(ids), scale_of, softcap)  # [Hq, T, m]
                values = cache.layers[layer].values[0, :, len(prefix) + chunk.start : len(prefix) + chunk.stop]
                head_dim, groups = values.shape[-1], len(weights) // len(values)
                out = modules[layer].o_proj.weight
                norms = [
                    (values[h // groups] @ out[:, h * head_dim : (h + 1) * head_dim].T).norm(dim=-1)
                    for h in range(len(weights))
                ]
                added = torch.stack(norms).unsqueeze(1) / inputs[layer].norm(dim=-1)[None, :, None]
                scaled = weights * added**power
                kept.append(scaled.reshape(len(values), -1, scaled.shape[-1]).amax(dim=1))
            cache.crop(-len(ids))
            rows.append(torch.stack(kept))
        for handle in handles:
            handle.remove()
        return torch.cat(rows, dim=-1)

    def _chunk_scores(self, layer, prefix_len, chunk, q_len, scale_of, softcap) -> Tensor:
        weights = self._chunk_weights(layer, prefix_len, chunk, q_len, scale_of, softcap)
        return weights.amax(dim=1).reshape(STATE.seen[layer][1].shape[1], -1, weights.shape[-1]).amax(dim=1)

    def _chunk_weights(self, layer, prefix_len, chunk, q_len, scale_of, softcap) -> Tensor:
        query, keys = (t[0].float() for t in STATE.seen[layer])
        picked = torch.cat(
            [
                keys[:, :prefix_len],
                keys[:, prefix_len + chunk.start : prefix_len + chunk.stop],
                keys[:, -q_len:],
            ],
            dim=1,
        )
        groups = query.shape[0] // keys.shape[0]
        scale = query.shape[-1] ** -0.5 if scale_of is None else scale_of(layer)
        logits = query @ picked.repeat_interleave(groups, 0).transpose(1, 2) * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        future = torch.ones(q_len, q_len, dtype=torch.bool).triu(1)
        logits[..., -q_len:] = logits[..., -q_len:].masked_fill(future, -torch.inf)
        return torch.softmax(logits, dim=-1)[..., prefix_len:-q_len]  # [Hq, T, m]


class Unwrapped:
    """The model's former attention for a moment, inside a `Reference` block."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference

    def __enter__(self) -> None:
        self.reference.model.set_attn_implementation(self.reference.before)

    def __exit__(self, *exc: object) -> None:
        self.reference.model.set_attn_implementation(NAME)
