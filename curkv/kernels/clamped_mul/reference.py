"""The clamped gated activation in torch."""

from __future__ import annotations

from torch import Tensor


def clamped_mul(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """Returns (up + 1) gate sigmoid(alpha gate) of both clamped (gpt-oss).

    Args:
        gate_up: [T, 2 I], gate in the first I columns and up in the others.
        alpha: What the gate is multiplied with in its sigmoid.
        limit: Highest gate, and largest absolute value of up.

    Returns:
        [T, I].
    """
    gate, up = gate_up.chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * (alpha * gate).sigmoid()
