"""Rows of large weights: no data, no training."""

from __future__ import annotations

from curkv.models.blocks import LayerWeights
from curkv.models.pruning.methods.base import LayerCut, Method, best_rows


class Magnitude(Method):
    """Scores a row by the product of the norms of its gate row, up row and down column.

    The product bounds what the row can add to the output, and stays the same when a factor moves from up to
    down, which leaves the model's function unchanged.
    """

    def cut(self, layer: int, weights: LayerWeights, kept: int) -> LayerCut:
        """Keeps the rows of largest product."""
        gate, up = weights.mlp.gate_up.chunk(2)
        return LayerCut(best_rows(gate.norm(dim=1) * up.norm(dim=1) * weights.mlp.down.norm(dim=0), kept))
