"""The gated activation with GELU in torch."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import gelu


def gelu_mul(gate_up: Tensor) -> Tensor:
    """Returns gelu(gate) * up, where gelu(x) = x / (1 + exp(-sqrt(8 / pi) (x + 0.044715 x^3))).

    The approximation with tanh of GELU (https://arxiv.org/abs/1606.08415), x times the share of normally
    distributed numbers that are below x.

    Args:
        gate_up: [T, 2 I], gate in the first I columns and up in the others.

    Returns:
        [T, I].
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return gelu(gate, approximate="tanh") * up
