"""CurDKV."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from curkv.cache.policies.base import CacheView, Needs

if TYPE_CHECKING:
    from curkv.cache.options import EvictionOptions
    from curkv.kernels.dispatch import Kernels


class CurDKV:
    """CurDKV, value-guided KV compression by approximated CUR decomposition
    (https://arxiv.org/abs/2509.15038).

    A token's score is the product of its key's and its value's approximate leverage (section 3 and algorithm
    1). With leverage "sketch", the paper's formula: ||k G||^2 ||v G||^2, G Gaussian [head_dim, rank] with
    variance 1 / rank, normalised per head. With leverage "window", the authors' released code: ||k||^2 and
    ||v||^2, each as a share of its window of 16 tokens; the presets differ in how the last, partial window is
    treated. No query is read.

    In decode G is drawn afresh at each round, as VaSE found it to matter (https://arxiv.org/abs/2606.03928).
    """

    name = "curdkv"
    description = "CurDKV: tokens whose keys and values carry the most energy, the same number for every head"
    needs = Needs()
    allocation: Literal["uniform", "adaptive"] = "uniform"
    published_sinks = 4
    reads = frozenset({"leverage", "rank", "window", "combine", "pool", "pool_kind"})

    def score(self, view: CacheView, options: EvictionOptions, kernels: Kernels) -> Tensor:
        """Score tokens by approximate leverage; a head's scores sum to 1."""
        rows = view.table.flatten(0, 1), view.lengths.flatten()
        settings: dict[str, Any] = {"combine": options.combine}
        if options.leverage == "sketch":
            settings |= {"normalization": "head", "sketch": gaussian_sketch(view, options.rank)}
        else:
            settings |= {"window": options.window, "partial": options.partial_window}
        scores = kernels.leverage_scores(view.pages, *rows, **settings)
        return scores.view(*view.lengths.shape, view.width)


def gaussian_sketch(view: CacheView, rank: int) -> Tensor:
    """Draw G, float32 [head_dim, rank] with entries of N(0, 1 / rank), for this request and round."""
    shape = view.pages.k.shape[-1], rank
    return torch.randn(shape, generator=view.generator(), device=view.lengths.device) / math.sqrt(rank)
