"""Mixtures of experts: a router chooses a few gated MLPs for each token."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from curkv.models.blocks import Exit, Gate, Gated, MixtureWeights, MlpWeights, Packer, gate
from curkv.models.config import ModelConfig


class Mixture:
    """Norm, router, the experts that it chooses, the one that all run through, norm.

    Tokens are sorted by expert, and each expert that was chosen runs once for all of its tokens. The router
    is not rounded: which experts run is a matter of small differences.
    """

    def __init__(
        self, config: ModelConfig, weights: MixtureWeights, pack: Packer, activation: Gate | None = None
    ):
        """Packs the weights; the experts' activation is that of the configuration unless one is given."""
        assert config.mixture is not None
        assert weights.norm is not None
        self._mixture, self._eps = config.mixture, config.rms_norm_eps
        self._norm, self._kernels = pack.keep("norm", weights.norm), pack.kernels
        self._router = pack.linear("mlp", weights.router, weights.router_bias, exact=True)
        self._experts = Experts(weights.experts, pack, activation or gate(config, pack.kernels))
        self._shared = None if weights.shared is None else Gated(config, weights.shared, pack)
        self._shared_gate = None
        if weights.shared_gate is not None:
            self._shared_gate = pack.linear("mlp", weights.shared_gate, exact=True)
        self._exit = Exit(weights.post_norm, self._eps, pack)

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Runs the block; see `Attention.__call__`."""
        kernels, mixture = self._kernels, self._mixture
        if residual is None:
            rows, residual = kernels.rms_norm(x, self._norm, self._eps), x
        else:
            rows, residual = kernels.rms_norm(x, self._norm, self._eps, residual)
        routes = kernels.route(self._router(rows).float(), mixture.num_chosen, mixture.normalised)
        out = self._experts(kernels.gather_rows(rows, routes.tokens), routes.groups)
        shared = None if self._shared is None else self._shared(rows)
        shared_gate = None if self._shared_gate is None else self._shared_gate(rows)
        return self._exit(kernels.combine(out, routes.places, routes.shares, shared, shared_gate)), residual


class Experts:
    """Gated MLPs of one shape, each for the tokens of its group."""

    def __init__(self, experts: Iterable[MlpWeights], pack: Packer, activation: Gate | None):
        """Packs the weights of one after the other; no activation: `silu_mul`."""
        layers = [
            (
                pack.linear("mlp", one.gate_up, one.gate_up_bias),
                pack.linear("mlp", one.down, one.down_bias),
            )
            for one in experts
        ]
        gate_ups, downs = zip(*layers, strict=True)
        self._gate_up, self._down = pack.kernels.group_linear(gate_ups), pack.kernels.group_linear(downs)
        self._activation = activation

    def __call__(self, x: Tensor, groups: Tensor) -> Tensor:
        """[T, hidden] from [T, hidden], rows of one expert behind those of another, see `Routes`."""
        gate_up = self._gate_up(x, groups)
        if self._activation is None:
            return self._down.after_silu_mul(gate_up, groups)
        return self._down(self._activation(gate_up), groups)
