"""How the weights of linear layers may be stored: one object per format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

GROUP = 32
"""Columns of an int4 weight that have a step and a lowest value in common."""
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)
"""How much of a group's range its 16 values may span; the one with the least squared error is taken."""

Encode = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class WeightFormat:
    """A way to store the weights of linear layers. Each backend packs it in its own way, under its name.

    Attributes:
        name: As asked for, and as reported.
        device: Kind of device that has it.
        dtype: Of what is not stored in the format: embedding, norms, and what goes through the model.
        encode: Weight [N, K] to what it becomes, [N, K], and a scale for each of its rows or None: what the
            format means, whatever memory it takes.
        rounds: Products round what goes into them too; then nothing around them needs to be more exact.
        head: Name of the format of the projection to the vocabulary, if it is another.
    """

    name: str
    device: Literal["cpu", "cuda"]
    dtype: torch.dtype
    encode: Encode
    rounds: bool = False
    head: str | None = None

    @property
    def of_head(self) -> WeightFormat:
        """The format of the projection to the vocabulary."""
        return self if self.head is None else WEIGHT_FORMATS[self.head]


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds each row to integers of at most 127, in steps of a 127th of its largest value.

    Args:
        weight: [N, K].

    Returns:
        integers: int8 [N, K].
        scales: float32 [N]; a row is about its integers times its scale.
    """
    scales = weight.abs().amax(dim=1).float() / 127
    steps = torch.where(scales > 0, scales, 1)[:, None]
    return (weight / steps).round().to(torch.int8), scales


def quantise_int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rounds each group of 32 columns of a row to 16 evenly spaced values.

    A weight that has been rounded so before (llama.cpp's Q4_1 and Q4_0) is not changed.

    Args:
        weight: [N, K].

    Returns:
        integers: uint8 [N, K up to a multiple of 32], 0 to 15.
        steps: float16 [N, groups].
        lows: float16 [N, groups]; a group is about its integers times its step plus its lowest value.
    """
    groups = pad(weight.float(), (0, -weight.shape[1] % GROUP)).view(len(weight), -1, GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    best = _round_groups(groups, low, high)
    for share in SHRINK[1:]:
        other = _round_groups(groups, share * low, share * high)
        better = other[3] < best[3]
        best = tuple(
            torch.where(better[..., None] if a.dim() > 2 else better, a, b)
            for a, b in zip(other, best, strict=True)
        )
    integers, steps, lows, _error = best
    return integers.flatten(1), steps, lows


def _round_groups(groups: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
    """Integers, steps and lowest values of groups [N, G, 32] over given ranges, and the squared errors."""
    lows, steps = low.half(), ((high - low) / 15).half()
    offset, step = lows.float()[..., None], steps.float()[..., None]
    integers = ((groups - offset) / torch.where(step > 0, step, 1)).round().clamp(0, 15)
    error = (integers * step + offset - groups).square().sum(-1)
    return integers.to(torch.uint8), steps, lows, error


def _as_given(weight: Tensor) -> tuple[Tensor, None]:
    return weight, None


def _rounded_to_int4(weight: Tensor) -> tuple[Tensor, None]:
    integers, steps, lows = quantise_int4(weight)
    rounded = integers.view(*steps.shape, GROUP) * steps.float()[..., None] + lows.float()[..., None]
    return rounded.flatten(1)[:, : weight.shape[1]].to(weight.dtype), None


FLOAT32 = WeightFormat("float32", "cpu", torch.float32, _as_given)
BFLOAT16 = WeightFormat("bfloat16", "cuda", torch.bfloat16, _as_given)
INT8 = WeightFormat("int8", "cpu", torch.float32, quantise, rounds=True)
INT4 = WeightFormat("int4", "cpu", torch.float32, _rounded_to_int4, rounds=True, head="int8")

WEIGHT_FORMATS = {form.name: form for form in (FLOAT32, BFLOAT16, INT8, INT4)}
