"""What the experts of each token have made of it, added up, in torch."""

from __future__ import annotations

from torch import Tensor


def combine(
    rows: Tensor, places: Tensor, shares: Tensor, shared: Tensor | None = None, gate: Tensor | None = None
) -> Tensor:
    """Sums rows with weights.

    Args:
        rows: [T k, d].
        places: int64 [T, k], which of them belong to each sum.
        shares: float32 [T, k], what they are multiplied with.
        shared: [T, d], added to the sums.
        gate: [T, 1], through whose sigmoid that goes before.

    Returns:
        [T, d].
    """
    out = (rows[places] * shares.to(rows.dtype)[..., None]).sum(1)
    if shared is None:
        return out
    return out + (shared if gate is None else shared * gate.sigmoid())
