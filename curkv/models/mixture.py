"""Mixtures of experts: a router chooses a few gated MLPs for each token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curkv.models.blocks import Exit, Gated, MixtureWeights, MlpWeights, Packer
from curkv.models.config import ModelConfig

MakeExpert = Callable[[ModelConfig, MlpWeights, Packer], Callable[[Tensor], Tensor]]


class Mixture:
    """Norm, router, the experts that it chooses, the one that all run through, norm.

    Tokens are sorted by expert, and each expert that was chosen runs once for all of its tokens. The router
    is not rounded: which experts run is a matter of small differences. Torch sorts, so that decode steps over
    it are not recorded.
    """

    def __init__(
        self, config: ModelConfig, weights: MixtureWeights, pack: Packer, expert: MakeExpert = Gated
    ):
        assert config.mixture is not None
        assert weights.norm is not None
        self._mixture, self._eps = config.mixture, config.rms_norm_eps
        self._norm = pack.keep("norm", weights.norm)
        self._rms_norm = pack.kernels.rms_norm
        self._router = pack.linear("mlp", weights.router, weights.router_bias, exact=True)
        self._experts = [expert(config, one, pack) for one in weights.experts]
        self._shared = None if weights.shared is None else Gated(config, weights.shared, pack)
        self._shared_gate = None
        if weights.shared_gate is not None:
            self._shared_gate = pack.linear("mlp", weights.shared_gate, exact=True)
        self._exit = Exit(weights.post_norm, self._eps, pack)

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Runs the block; see `Attention.__call__`."""
        if residual is None:
            rows, residual = self._rms_norm(x, self._norm, self._eps), x
        else:
            rows, residual = self._rms_norm(x, self._norm, self._eps, residual)
        out = self._chosen(rows)
        if self._shared is not None:
            shared = self._shared(rows)
            out += shared if self._shared_gate is None else shared * self._shared_gate(rows).sigmoid()
        return self._exit(out), residual

    def _chosen(self, rows: Tensor) -> Tensor:
        """The weighted sum of what the chosen experts make of each row, [T, hidden]."""
        logits = self._router(rows).float()
        best, experts = logits.topk(self._mixture.num_chosen, dim=-1)
        weights = (best if self._mixture.normalised else logits).softmax(-1)
        if not self._mixture.normalised:
            weights = weights.gather(1, experts)
        order = experts.flatten().argsort(stable=True)
        tokens, shares = order // self._mixture.num_chosen, weights.flatten()[order].to(rows.dtype)
        counts = experts.flatten().bincount(minlength=len(self._experts)).tolist()
        out, start = torch.zeros_like(rows), 0
        for expert, count in zip(self._experts, counts, strict=True):
            if count:
                part = slice(start, start + count)
                out.index_add_(0, tokens[part], expert(rows[tokens[part]]) * shares[part, None])
                start += count
        return out
