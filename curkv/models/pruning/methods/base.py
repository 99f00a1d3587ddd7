"""What a pruning method is, and what it is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curkv.models.blocks import LayerWeights
from curkv.models.pruning.source import Source

Progress = Callable[[str, int, int], None]
"""Told (what is being done, steps done, steps in all)."""

DOWN = "mlp.down_proj.weight"


@dataclass(frozen=True, slots=True)
class LayerCut:
    """What becomes of one layer.

    Attributes:
        rows: int64 [kept], ascending: the MLP rows that stay.
        replaced: Tensors that change beyond the cut, by their name under `model.layers.<i>.`; MLP weights in
            their cut shape.
    """

    rows: Tensor
    replaced: Mapping[str, Tensor] = field(default_factory=dict)

    def apply(self, weights: LayerWeights) -> LayerWeights:
        """Returns the layer that remains."""
        mlp = weights.mlp
        gate, up = (part[self.rows] for part in mlp.gate_up.chunk(2))
        bias = mlp.gate_up_bias
        cut = replace(
            mlp,
            gate_up=torch.cat([gate, up]),
            gate_up_bias=None if bias is None else torch.cat([part[self.rows] for part in bias.chunk(2)]),
            down=self.replaced.get(DOWN, mlp.down[:, self.rows]),
        )
        return replace(weights, feed=cut)


class Method(ABC):
    """Chooses the rows that stay; made for one run."""

    def prepare(self, source: Source, kept: int, progress: Progress) -> None:  # noqa: B027
        """Does what precedes the first layer: trains a policy, writes text."""

    @abstractmethod
    def cut(self, layer: int, weights: LayerWeights, kept: int) -> LayerCut:
        """Decides about a layer; called once for every layer, in order, with float32 weights."""

    def save(self, directory: Path) -> None:  # noqa: B027
        """Writes beside the checkpoint what a later run can reuse."""

    def provenance(self) -> dict[str, Any]:
        """Returns what `pruning.json` says beyond method, seed and rows."""
        return {}


def best_rows(scores: Tensor, kept: int) -> Tensor:
    """Returns the `kept` rows of highest score in ascending order; of equal scores the lower row wins."""
    order = scores.argsort(descending=True, stable=True)
    return order[:kept].sort().values
