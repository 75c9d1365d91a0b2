"""From final hidden states to log-probabilities, without running the decoder again."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel

SOFTMAX_COST = 400  # weights that softmax and comparison of one logit are worth, measured: docs/log.md


def log_probs(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """[n, V] float32 log-probabilities of the next token, as the model's own forward pass gives them.

    hidden: [n, E], final hidden states of its decoder. Scales and the soft cap of the logits are those of its config,
    by the names that transformers has for them.
    """
    config = model.config.get_text_config(decoder=True)
    logits: Tensor = model.get_output_embeddings()(hidden).float()
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    if scale != 1:
        logits = logits * scale
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    return torch.log_softmax(logits, dim=-1)


def head_cost(model: PreTrainedModel) -> float:
    """What the log-probabilities of one token cost, as a share of what the decoder does for one.

    Counted in weights that a token is multiplied with; embeddings are only looked up. Infinite where the head is no
    plain matrix.
    """
    weight = getattr(model.get_output_embeddings(), "weight", None)
    if weight is None or weight.dim() != 2:
        return math.inf
    num_body = sum(p.numel() for p in model.get_decoder().parameters()) - model.get_input_embeddings().weight.numel()
    return float(weight.shape[0] * (weight.shape[1] + SOFTMAX_COST) / max(1, num_body))
