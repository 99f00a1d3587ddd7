"""CurDKV, and with Ada-KV's allocation AdaCurDKV."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from curkv.cache.allocation import ALLOCATIONS
from curkv.cache.declarations import Choice, Integer, option, when
from curkv.cache.policies.base import Policy, PooledPolicy, Published
from curkv.cache.presets import Leverage
from curkv.cache.upload import upload
from curkv.cache.view import CacheView, blank

if TYPE_CHECKING:
    from curkv.kernels.dispatch import Kernels


@dataclass(frozen=True, kw_only=True)
class LeveragePolicy(Policy):
    """A policy that reads how much keys and values weigh."""

    leverage: Leverage = option(
        "window",
        Choice(("window", "norm", "sketch", "exact")),
        "How CurDKV measures keys and values: their energy in windows or (norm) in the whole head, in a "
        "random sketch, or exact statistical leverage.",
        yields=True,
        preset="leverage",
    )
    rank: int = option(20, Integer(1, 1024), "Columns of the sketch.", effective=when(leverage="sketch"))
    window: int = option(
        16, Integer(1, 65536), "Tokens of a window of windowed leverage.", effective=when(leverage="window")
    )
    combine: Literal["product", "mean", "key", "value"] = option(
        "product",
        Choice(("product", "mean", "key", "value")),
        "How the terms of key and value combine.",
        yields=True,
    )

    def leverage_scores(self, view: CacheView, kernels: Kernels) -> Tensor:
        """Approximate leverage of every stored token: float32 [L, H, n_max], a head's sum is 1."""
        settings: dict[str, Any] = {"combine": self.combine}
        if self.leverage == "exact":
            return exact_leverage(view, self.combine)
        if self.leverage == "sketch":
            settings |= {"normalization": "head", "sketch": gaussian_sketch(view, self.rank)}
        elif self.leverage == "norm":
            settings |= {"normalization": "head"}
        else:
            settings |= {"window": self.window, "partial": self.preset.partial_window}
        scores = kernels.leverage_scores(view.pages, *view.rows, width=view.width, **settings)
        return scores.view(*view.lengths.shape, view.width)


@dataclass(frozen=True, kw_only=True)
class CurDKV(LeveragePolicy, PooledPolicy):
    """CurDKV, value-guided KV compression by approximated CUR decomposition
    (https://arxiv.org/abs/2509.15038).

    A token's score is the product of its key's and its value's approximate leverage (section 3 and algorithm
    1). With leverage "sketch", the paper's formula: ||k G||^2 ||v G||^2, G Gaussian [head_dim, rank] with
    variance 1 / rank, normalised per head. With leverage "window", the authors' released code: ||k||^2 and
    ||v||^2, each as a share of its window of 16 tokens; the presets differ in how the last, partial window is
    treated. "norm": the same energies, normalised per head. "exact": what leverage means in the theory of
    CUR, diag(X (X^T X)^-1 X^T) of the centred keys and values. No query is read.

    In decode G is drawn afresh at each round, as VaSE found it to matter (https://arxiv.org/abs/2606.03928).
    """

    name: str = "curdkv"
    description: str = (
        "CurDKV: tokens whose keys and values carry the most energy, the same number for every head"
    )
    published: Published = Published(sinks=4)
    factor = True

    def score_tokens(self, view: CacheView, kernels: Kernels) -> Tensor:
        """Score tokens by approximate leverage."""
        return self.leverage_scores(view, kernels)


ADA_CURDKV = CurDKV(
    name="adacurdkv",
    description="AdaCurDKV: CurDKV's scores, heads of a layer compete for its tokens above a floor",
    allocation=ALLOCATIONS["adaptive"],
)
"""CurDKV's scores with Ada-KV's allocation (https://arxiv.org/abs/2509.15038 section 4)."""


def gaussian_sketch(view: CacheView, rank: int) -> Tensor:
    """Draw G, float32 [head_dim, rank] with entries of N(0, 1 / rank), for this request and round."""
    shape = view.pages.head_dim, rank
    return upload(torch.randn(shape, generator=view.generator()) / math.sqrt(rank), view.lengths.device)


def exact_leverage(view: CacheView, combine: str) -> Tensor:
    """Statistical leverage of the centred keys and values, combined; a head's scores sum to 1.

    Returns:
        float32 [L, H, n_max], -inf past a head's length.
    """
    layers, stored = [], view.stored
    for layer in range(view.num_layers):
        key, value = (
            leverage(read(layer), stored[layer]) if combine != skipped else None
            for read, skipped in ((view.keys, "value"), (view.values, "key"))
        )
        if key is None or value is None:
            layers.append(key if value is None else value)
        else:
            layers.append(key * value if combine == "product" else (key + value) / 2)
    scores = torch.stack([layer for layer in layers if layer is not None])
    scores /= scores.sum(-1, keepdim=True).clamp_min(1e-30)
    return scores.masked_fill_(~stored, -torch.inf)


def leverage(x: Tensor, judged: Tensor) -> Tensor:
    """Diagonal of X (X^T X)^-1 X^T of the centred rows X, by a Cholesky factor of X^T X [head_dim, head_dim].

    Args:
        x: float32 [H, n, head_dim], finite.
        judged: bool [H, n], the rows.

    Returns:
        float32 [H, n], 0 for those that are no rows; a head's sum to the rank of X.
    """
    rows = judged.float()[:, None]
    x = blank(x - rows @ x / rows.sum(-1, keepdim=True).clamp_min(1), ~judged)
    gram = x.transpose(1, 2) @ x
    # Fewer tokens than channels leave the Gram matrix singular.
    ridge = 1e-6 * gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    gram.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    return (x @ whitening(gram)).square_().sum(-1)


def whitening(gram: Tensor) -> Tensor:
    """W with W W^T the inverse of Gram matrices, float32 [..., d, d].

    Rounding may leave the matrix of fewer tokens than channels indefinite: then that of a firmer one, since
    what the tokens span is far above any ridge.
    """
    factor, failed = torch.linalg.cholesky_ex(gram)
    eye = torch.eye(gram.shape[-1], device=gram.device)
    if gram.is_cuda or failed.any():  # to ask a GPU is to wait for it
        firmer = gram + 1e-4 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * eye
        factor = torch.where((failed > 0)[..., None, None], torch.linalg.cholesky_ex(firmer)[0], factor)
    upper: Tensor = torch.linalg.solve_triangular(factor, eye, upper=False).mT
    return upper
