"""Orthogonal matching pursuit: which columns make up best for all of them, chosen one after another (arXiv 2602.16284).

Of columns A and targets T each step takes the column that leaves least of |A_S U - T|^2 + ridge |U|^2 over all U, where
S are the columns taken so far and this one. What is left of Gram matrix and targets is followed by a Cholesky factor
that grows by a row a step, so that no step solves a system.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RIDGE = 0.01  # of the mean diagonal of the Gram matrix
RANK = 16  # directions of the targets that are looked at, those in which they are largest


def pursue(gram: Tensor, took: Tensor, counts: Sequence[int]) -> Tensor:
    """The columns of each of B systems that are taken: [B, m] bool, as many as `counts` says; ties to the lower one.

    gram: [B, m, m] of the columns with themselves.  took: [B, m, r], of these with the targets.  counts: at most the
    columns of each system; zeros behind these are never taken.  float32.
    """
    order = sorted(range(len(counts)), key=lambda number: -counts[number])  # so that those that go on stand first
    gram, left, diagonal = gram[order], took[order], gram.diagonal(dim1=1, dim2=2)[order]
    ridge = (RIDGE * diagonal.sum(1) / (diagonal > 0).sum(1).clamp_min(1)).unsqueeze(1)
    diagonal = diagonal + ridge
    rows = gram.new_zeros(len(gram), max(counts), gram.shape[1])  # of the factor
    taken = torch.zeros_like(diagonal, dtype=torch.bool)
    for step in range(max(counts)):
        here = torch.arange(sum(count > step for count in counts))
        own, open_ = diagonal[: len(here)], left[: len(here)]  # views
        best = (open_.square().sum(2) / own).masked_fill_(taken[: len(here)], -1).argmax(1)
        taken[here, best] = True
        root = own[here, best].sqrt().unsqueeze(1)
        before = rows[here, :step, best].unsqueeze(1) @ rows[: len(here), :step]
        row = rows[: len(here), step] = (gram[here, best] - before.squeeze(1)) / root
        open_.baddbmm_(row.unsqueeze(2), (open_[here, best] / root).unsqueeze(1), alpha=-1)
        torch.maximum(own.sub_(row.square()), ridge[: len(here)], out=own)
    return torch.zeros_like(taken).index_copy_(0, torch.tensor(order), taken)


def principal(targets: Tensor) -> Tensor:
    """The directions [D, r] in which targets [R, D] are largest, at most RANK of them."""
    return torch.linalg.eigh(targets.T @ targets).eigenvectors[:, -RANK:]
