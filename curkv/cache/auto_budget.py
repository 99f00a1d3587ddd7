"""The smallest budget of each layer whose loss on the last queries stays below what a request allows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from curkv.cache.options import EvictionOptions
from curkv.cache.policies.base import CacheView

STEPS = 64
"""Budgets that are tried per layer, evenly spaced."""


def layer_budgets(view: CacheView, scores: Tensor, options: EvictionOptions) -> Tensor:
    """Find how many tokens each layer has to keep.

    With the tokens of a head in the order of their scores, the attention output of the observed queries over
    the first m of them is known for all m from one pass over K and V. The loss of a layer at m is the norm of
    its difference from the output over all tokens, relative to that, all heads and queries together.

    Args:
        view: The sequence; the window's queries are observed.
        scores: float32 [L, H, n], +inf for tokens that are always kept, -inf past a head's length.
        options: `observation` and `max_loss` are read.

    Returns:
        int32 [L, H], the same for all heads of a layer; at least the tokens that are always kept.
    """
    queries = view.queries(options.observation or 1)
    queries = queries.view(*view.lengths.shape, *queries.shape[1:])
    limit = options.max_loss or 0.0
    position = view.position
    step = -(-view.width // STEPS)
    budgets = []
    for layer in range(view.num_layers):
        order = scores[layer].argsort(dim=-1, descending=True, stable=True)
        outputs = _partial_outputs(view, layer, queries[layer], position[layer], order, step)
        whole = outputs[:, -1:]
        error = (outputs - whole).square().sum((0, 2, 3)) / whole.square().sum().clamp_min(1e-30)
        enough = (error.sqrt() <= limit).nonzero()[0, 0]
        budgets.append((int(enough) + 1) * step)
    always = (scores == torch.inf).sum(-1).amax(1)
    found = torch.tensor(budgets, device=always.device).maximum(always).clamp_max(view.width)
    return found.int()[:, None].expand(view.lengths.shape).contiguous()


def _partial_outputs(
    view: CacheView, layer: int, queries: Tensor, position: Tensor, order: Tensor, step: int
) -> Tensor:
    """Attention outputs over the first step, 2 step, ... tokens of an order.

    Args:
        view: The sequence.
        layer: Index of the layer.
        queries: float32 [H, w, group, head_dim].
        position: int32 [H, n].
        order: int64 [H, n], indices of the stored tokens.
        step: Tokens between two outputs.

    Returns:
        float32 [H, n / step rounded up, w * group, head_dim].
    """
    keys, values = (view.vectors(storage, layer) for storage in (view.pages.k, view.pages.v))
    n, window = keys.shape[1], queries.shape[1]
    newest = position.amax() - torch.arange(window - 1, -1, -1, device=position.device)
    logits = torch.einsum("hwgd,hnd->hwgn", queries, keys) * view.scale
    hidden = (position[:, None] > newest[:, None]) | (position < 0)[:, None]
    logits = logits.masked_fill_(hidden[:, :, None], -torch.inf).flatten(1, 2)
    weights = (logits - logits.amax(-1, keepdim=True)).exp_()
    pad = -n % step
    weights = F.pad(weights.gather(2, order[:, None].expand_as(weights)), (0, pad))
    values = F.pad(values.gather(1, order[..., None].expand_as(values)), (0, 0, 0, pad))
    parts = weights.view(*weights.shape[:2], -1, step).transpose(1, 2)
    sums = (parts @ values.view(len(values), -1, step, values.shape[2])).cumsum(1)
    mass = parts.sum(-1, keepdim=True).cumsum(1)
    outputs: Tensor = sums / mass.clamp_min(1e-30)
    return outputs
