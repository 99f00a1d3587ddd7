"""How queries and keys are rotated: bases of frequencies, and their scaling for longer contexts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Position interpolation (https://arxiv.org/abs/2306.15595).

    Attributes:
        factor: Divides all frequencies.
    """

    factor: float
    amplitude: ClassVar[float] = 1.0

    def scale(self, frequencies: Tensor, max_positions: int) -> Tensor:
        """Returns the scaled frequencies for texts of up to `max_positions`."""
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
    amplitude: ClassVar[float] = 1.0

    def scale(self, frequencies: Tensor, max_positions: int) -> Tensor:
        """Divides low frequencies by the factor, keeps high ones, and blends linearly between the two."""
        low, high = self.low_freq_factor, self.high_freq_factor
        waves = self.original_max_positions * frequencies / (2 * math.pi)
        blend = ((waves - low) / (high - low)).clamp(0, 1)
        return (1 - blend) * frequencies / self.factor + blend * frequencies


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (https://arxiv.org/abs/2309.00071, section 3; transformers' `_compute_yarn_parameters`).

    Attributes:
        factor: Divides the frequencies that turn less than `beta_slow` times in the original context.
        theta: Base of the frequencies.
        original_max_positions: Context length of the pretraining, in tokens.
        amplitude: Multiplies cosines and sines.
        beta_fast: Turns in the original context from which on frequencies are left alone.
        beta_slow: See `factor`; between the two, indices of frequencies are blended linearly.
        truncate: The ends of that band are whole indices.
    """

    factor: float
    theta: float
    original_max_positions: int
    amplitude: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def scale(self, frequencies: Tensor, max_positions: int) -> Tensor:
        """Divides low frequencies by the factor, keeps high ones, and blends linearly between the two."""
        count = len(frequencies)
        low, high = self._index(self.beta_fast, count), self._index(self.beta_slow, count)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * count - 1)
        band = high - low if high != low else 0.001
        scaled = ((torch.arange(count, dtype=torch.float32) - low) / band).clamp(0, 1)
        return frequencies / self.factor * scaled + frequencies * (1 - scaled)

    def _index(self, turns: float, count: int) -> float:
        """Index of the frequency, of so many, that turns so often in the original context."""
        return count * math.log(self.original_max_positions / (turns * 2 * math.pi)) / math.log(self.theta)


@dataclass(frozen=True, slots=True)
class LongRope:
    """LongRoPE (https://arxiv.org/abs/2402.13753; transformers' `_compute_longrope_parameters`).

    Which factors count depends on the longest text that is served, so that what lies in a cache stays valid.

    Attributes:
        short: Divide the frequencies if no text is longer than the original context; one for each.
        long: Divide them otherwise.
        original_max_positions: Context length of the pretraining, in tokens.
        amplitude: Multiplies cosines and sines.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_max_positions: int
    amplitude: float

    def scale(self, frequencies: Tensor, max_positions: int) -> Tensor:
        """Divides each frequency by its factor."""
        factors = self.long if max_positions > self.original_max_positions else self.short
        return frequencies / torch.tensor(factors, dtype=torch.float32)


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | LongRope


@dataclass(frozen=True, slots=True)
class Rope:
    """A way to rotate queries and keys.

    Attributes:
        theta: Base of the frequencies.
        scaling: Of those, or None.
    """

    theta: float
    scaling: RopeScaling | None = None
