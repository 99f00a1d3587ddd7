"""Tables of the cosines and sines that queries and keys are rotated with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from curkv.models.config import ModelConfig
from curkv.models.rope_scaling import Rope

RopeTables = tuple[tuple[Tensor, Tensor], ...]
"""By layer: cosines and sines, float32 [positions, head_dim / 2]; layers that rotate alike share them."""


def rope_tables(config: ModelConfig, max_positions: int | None = None) -> RopeTables:
    """Returns the cosines and sines of every position, computed in float32 as transformers does.

    Channels of a head that are not rotated, or all of a layer that rotates nothing, have cosine 1 and sine 0.

    Args:
        config: The model.
        max_positions: Rows wanted, at least as many as the longest text has tokens; `config.max_positions`
            unless told.
    """
    max_positions = max_positions or config.max_positions
    ropes = [config.layer(index).rope for index in range(config.num_layers)]
    tables = {rope: _tables(rope, config, max_positions) for rope in dict.fromkeys(ropes)}
    return tuple(tables[rope] for rope in ropes)


def _tables(rope: Rope | None, config: ModelConfig, max_positions: int) -> tuple[Tensor, Tensor]:
    if rope is None:
        cos = torch.ones(max_positions, config.padded_head_dim // 2)
        return cos, torch.zeros_like(cos)
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32) / config.rotary_dim
    frequencies, amplitude = 1.0 / rope.theta**exponents, 1.0
    if rope.scaling is not None:
        frequencies, amplitude = rope.scaling.scale(frequencies, max_positions), rope.scaling.amplitude
    positions = torch.arange(max_positions, dtype=torch.float32)
    angles = torch.outer(positions, frequencies)
    cos, sin = angles.cos(), angles.sin()
    if amplitude != 1.0:
        cos, sin = cos * amplitude, sin * amplitude
    unrotated = (config.padded_head_dim - config.rotary_dim) // 2
    if unrotated:
        cos, sin = (F.pad(table, (0, unrotated), value=rest) for table, rest in ((cos, 1.0), (sin, 0.0)))
    return cos, sin
