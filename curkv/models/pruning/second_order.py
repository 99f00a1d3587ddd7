"""Second-order choice of MLP rows and the least-squares update of what reads them (Optimal Brain Surgeon).

An MLP's output is H D^T for activations H [tokens, n] and down_proj D [hidden, n]. With the Gram matrix
G = H^T H every quantity below follows without the activations themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 8
"""Rows removed between updates of the inverse; 1 is exact."""


def surgeon(gram: Tensor, down: Tensor, kept: int, damping: float) -> tuple[Tensor, Tensor]:
    """Removes rows greedily, each time those whose loss the others can least-squares compensate best.

    Removing row j and refitting the rest adds ||D_j||^2 / (G^-1)_jj to the squared error of the output (OBS,
    Hassibi and Stork 1993; for whole columns: ZipLM, arXiv 2302.04089, section 3).

    Args:
        gram: [n, n], second moments of the activations.
        down: [hidden, n].
        kept: Rows to keep.
        damping: Added to the diagonal, as a share of its mean.

    Returns:
        The rows that stay, int64 [kept], ascending, and their columns of down_proj after the refits, float32
        [hidden, kept].
    """
    inverse = torch.linalg.inv(damped(gram.double(), damping))
    weights = down.to(torch.float64, copy=True)
    alive = torch.ones(len(gram), dtype=torch.bool)
    while (excess := int(alive.sum()) - kept) > 0:
        loss = weights.square().sum(0) / inverse.diagonal()
        removed = loss.masked_fill(~alive, torch.inf).topk(min(BLOCK, excess), largest=False).indices
        columns = inverse[:, removed]
        update = torch.linalg.solve(columns[removed], columns.T)
        weights.addmm_(weights[:, removed], update, alpha=-1)
        inverse.addmm_(columns, update, alpha=-1)
        alive[removed] = False
        weights[:, removed] = 0
        inverse[removed, removed] = 1  # keeps later divisions finite; masked by `alive`
    rows = alive.nonzero().flatten()
    return rows, weights[:, rows].float()


def refit(gram: Tensor, cross: Tensor, down: Tensor, damping: float) -> Tensor:
    """Solves the ridge regression min ||H D'^T - Y||^2 + lambda ||D' - D||^2 for D'.

    Args:
        gram: [k, k], H^T H of the rows that stay.
        cross: [k, hidden], H^T Y.
        down: [hidden, k], the weights to stay close to.
        damping: lambda as a share of the mean of the Gram matrix' diagonal.

    Returns:
        float32 [hidden, k].
    """
    gram, cross, down = gram.double(), cross.double(), down.double()
    pull = damping * gram.diagonal().mean()
    solution: Tensor = torch.linalg.solve(damped(gram, damping), cross + pull * down.T)
    return solution.T.float()


def damped(gram: Tensor, damping: float) -> Tensor:
    """Returns the matrix with a share of the mean of its diagonal added to that."""
    result = gram.clone()
    result.diagonal().add_(damping * gram.diagonal().mean())
    return result
