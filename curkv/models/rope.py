"""Rotary frequencies: their scalings, and the tables of cosines and sines."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from curkv.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Position interpolation (https://arxiv.org/abs/2306.15595).

    Attributes:
        factor: Divides all frequencies.
    """

    factor: float

    def scale(self, frequencies: Tensor) -> Tensor:
        """Returns the scaled frequencies."""
        return frequencies / self.factor


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """RoPE scaling of Llama 3.1 (Meta's `apply_scaling`; transformers' `_compute_llama3_parameters`).

    Attributes:
        factor: Divides the frequencies whose wavelength exceeds original_max_positions / low_freq_factor.
        low_freq_factor: Start of the band in which scaled and plain frequencies are blended.
        high_freq_factor: End of that band; shorter wavelengths are left alone.
        original_max_positions: Context length of the pretraining, in tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def scale(self, frequencies: Tensor) -> Tensor:
        """Divides low frequencies by the factor, keeps high ones, and blends linearly between the two."""
        low, high = self.low_freq_factor, self.high_freq_factor
        waves = self.original_max_positions * frequencies / (2 * math.pi)
        blend = ((waves - low) / (high - low)).clamp(0, 1)
        return (1 - blend) * frequencies / self.factor + blend * frequencies


RopeScaling = LinearScaling | Llama3Scaling


def rope_tables(config: ModelConfig, max_positions: int | None = None) -> tuple[Tensor, Tensor]:
    """Returns the cosines and sines of every position, computed in float32 as transformers does.

    Args:
        config: The model.
        max_positions: Rows wanted, `config.max_positions` unless told.

    Returns:
        cos, sin: float32 [max_positions, head_dim / 2].
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_scaling is not None:
        frequencies = config.rope_scaling.scale(frequencies)
    positions = torch.arange(max_positions or config.max_positions, dtype=torch.float32)
    angles = torch.outer(positions, frequencies)
    return angles.cos(), angles.sin()
