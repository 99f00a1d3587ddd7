"""Rows drawn at random: the baseline that every other method has to beat."""

from __future__ import annotations

import torch

from curkv.models.blocks import LayerWeights
from curkv.models.pruning.methods.base import LayerCut, Method


class Random(Method):
    """Keeps rows drawn without replacement, each layer's independently."""

    def __init__(self, seed: int = 0):
        self._generator = torch.Generator().manual_seed(seed)

    def cut(self, layer: int, weights: LayerWeights, kept: int) -> LayerCut:
        """Draws the rows of a layer."""
        order = torch.randperm(weights.mlp.down.shape[1], generator=self._generator)
        return LayerCut(order[:kept].sort().values)
