"""The gated activation of the MLP in torch."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import silu


def silu_mul(gate_up: Tensor) -> Tensor:
    """Returns silu(gate) * up, where silu(x) = x / (1 + exp(-x)) (SwiGLU, https://arxiv.org/abs/2002.05202).

    Args:
        gate_up: [T, 2 I], gate in the first I columns and up in the others.

    Returns:
        [T, I].
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up
