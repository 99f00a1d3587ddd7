"""Which experts each token runs through, in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from curkv.kernels.route.spec import Routes


def route(logits: Tensor, chosen: int, normalised: bool) -> Routes:
    """Chooses the experts of the highest logits, and sorts their tokens by expert.

    Args:
        logits: float32 [T, E], of a router.
        chosen: Experts of each token, k.
        normalised: Whether the shares of a token's experts sum to 1; else they are those among all.

    Returns:
        See `Routes`; equal logits are in any order.
    """
    count, experts = logits.shape
    best, found = logits.topk(chosen, dim=-1)
    shares = (best if normalised else logits).softmax(-1)
    if not normalised:
        shares = shares.gather(1, found)
    order = found.flatten().argsort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    sizes = torch.bincount(found.flatten(), minlength=experts)
    used = sizes.nonzero()[:, 0]
    groups = torch.zeros(min(experts, len(order)), 3, dtype=torch.int64, device=order.device)
    groups[: len(used)] = torch.stack([used, (sizes.cumsum(0) - sizes)[used], sizes[used]], -1)
    return Routes(order // chosen, places.view(count, chosen), shares, groups)
