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
    systems, (size, most) = torch.arange(len(gram)), (gram.shape[1], max(counts))
    left, diagonal = took.clone(), gram.diagonal(dim1=1, dim2=2).clone()
    ridge = RIDGE * diagonal.sum(1) / (diagonal > 0).sum(1).clamp_min(1)
    diagonal += ridge.unsqueeze(1)
    rows = gram.new_zeros(len(gram), most, size)  # of the factor
    taken = torch.zeros(len(gram), size, dtype=torch.bool, device=gram.device)
    wanted = torch.tensor(counts)
    for step in range(most):
        gain = (left.square().sum(2) / diagonal).masked_fill_(taken, -1)
        best = gain.argmax(1)
        root = diagonal[systems, best].sqrt()
        before = rows[systems, :step, best].unsqueeze(1) @ rows[:, :step]
        row = (gram[systems, best] - before.squeeze(1)) / root.unsqueeze(1)
        left -= row.unsqueeze(2) * (left[systems, best] / root.unsqueeze(1)).unsqueeze(1)
        diagonal = (diagonal - row.square()).maximum(ridge.unsqueeze(1))
        rows[:, step] = row
        open_ = systems[wanted > step]
        taken[open_, best[open_]] = True
    return taken


def principal(targets: Tensor) -> Tensor:
    """The directions [D, r] in which targets [R, D] are largest, at most RANK of them."""
    return torch.linalg.eigh(targets.T @ targets).eigenvectors[:, -RANK:]
