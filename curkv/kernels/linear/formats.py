"""How the weights of linear layers may be stored: one object per format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from curkv.kernels.linear.stored import Grids, StoredRows

GROUP = 32
"""Columns of an int4 weight that have a step and a lowest value in common."""
MOST_STEPS = 12
"""Grids tried that reach from a group's lowest value to its highest in 15, 14, ... steps."""
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)
"""How much of a group's range its 16 values may span, where no such grid fits."""
NEGLIGIBLE = 0.02
"""Squared error of a group, in squares of its step, that float16's rounding of a grid leaves."""
ON_GRID = 1e-5
"""Share of a weight's squares that rounding it to 4 bits may cost if it has been rounded to them before."""
LARGEST_FP8 = 448.0
"""Largest 8-bit float of four bits of exponent and three of mantissa."""
LOOKED_AT = 64
"""Rows of a weight that say whether it has been."""

Encode = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class WeightFormat:
    """A way to store the weights of linear layers. Each backend packs it in its own way, under its name.

    Attributes:
        name: As asked for, and as reported.
        device: Kind of device that has it.
        dtype: Of what is not stored in the format: norms, and what goes through the model.
        encode: Weight [N, K] to what it becomes, [N, K], and a scale for each of its rows or None: what the
            format means, whatever memory it takes.
        rounds: Products round what goes into them too; then nothing around them needs to be more exact.
        head: Format of the embedding and of the projection to the vocabulary, if it is another.
        published: Weights that have been rounded to 4 bits before are stored in them; encode is for the rest.
        multiple: Weights whose N or K is no multiple of this stay as they are.
        product: Type of the products, if it is not that of x.
    """

    name: str
    device: Literal["cpu", "cuda"]
    dtype: torch.dtype
    encode: Encode
    rounds: bool = False
    head: WeightFormat | None = None
    published: bool = False
    multiple: int = 1
    product: torch.dtype | None = None

    def of(self, weight: Tensor) -> WeightFormat:
        """The format of a weight [N, K] in a layer."""
        if any(size % self.multiple for size in weight.shape):
            return BFLOAT16
        if not self.published:
            return self
        return INT4 if on_int4_grid(weight) else INT8

    @property
    def of_head(self) -> WeightFormat:
        """The format of the embedding and of the projection to the vocabulary."""
        return self if self.head is None else self.head


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds each row to integers of at most 127, in steps of a 127th of its largest value.

    Args:
        weight: [N, K].

    Returns:
        integers: int8 [N, K].
        scales: float32 [N]; a row is about its integers times its scale.
    """
    scaled, scales = _in_steps(weight, 127)
    return scaled.round().to(torch.int8), scales


def quantise_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds each row to 8-bit floats, after its largest value has become their largest one, 448.

    Args:
        weight: [N, K].

    Returns:
        floats: float8_e4m3fn [N, K].
        scales: float32 [N]; a row is about its floats times its scale.
    """
    scaled, scales = _in_steps(weight, LARGEST_FP8)
    return scaled.clamp(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn), scales


def _in_steps(weight: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Rows of [N, K] scaled so that their largest values are `largest`, and the scales; zeros stay zeros."""
    scales = weight.abs().amax(dim=1).float() / largest
    return weight / torch.where(scales > 0, scales, 1)[:, None], scales


def quantise_int4(weight: Tensor) -> Grids:
    """Rounds each group of 32 columns of a row to 16 evenly spaced values.

    The grid with the least squared error is taken, of some that reach from the lowest value to the highest
    in 15 steps or fewer, and some that reach less far. So a weight that has been rounded to such values
    before (llama.cpp's Q4_0, Q4_1 and Q4_K, AWQ, GPTQ) is not changed, even where a group lacks some of them.

    Args:
        weight: [N, K].
    """
    if isinstance(weight, StoredRows) and (known := weight.grids()) is not None:
        return known
    groups = pad(weight.float(), (0, -weight.shape[1] % GROUP)).view(-1, GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    trials = [(low, (high - low) / (15 - fewer)) for fewer in range(MOST_STEPS)]
    trials += [(share * low, (share * high - share * low) / 15) for share in SHRINK[1:]]
    integers, steps, lows, errors = best = _round_groups(groups, *trials[0])
    for trial in trials[1:]:
        left = (errors > NEGLIGIBLE * steps.float().square()).nonzero()[:, 0]
        other = _round_groups(groups[left], *(side[left] for side in trial))
        better = other[3] < errors[left]
        for kept, new in zip(best, other, strict=True):
            kept[left[better]] = new[better]
    shape = len(weight), -(-weight.shape[1] // GROUP)
    return Grids(integers.view(shape[0], -1), steps.view(shape), lows.view(shape))


def _round_groups(groups: Tensor, low: Tensor, step: Tensor) -> tuple[Tensor, ...]:
    """Integers, steps and lowest values of groups [G, 32] on given grids, and the squared errors."""
    lows, steps = low.half(), step.half()
    offset, size = lows.float()[..., None], steps.float()[..., None]
    inverse = 1 / torch.where(size > 0, size, 1)
    integers = ((groups - offset) * inverse).round().clamp(0, 15)
    error = (integers * size + offset - groups).square().sum(-1)
    return integers.to(torch.uint8), steps, lows, error


def _as_given(weight: Tensor) -> tuple[Tensor, None]:
    return weight, None


def on_int4_grid(weight: Tensor) -> bool:
    """Tells whether a weight [N, K] has been rounded to 4 bits before, by some of its rows."""
    rows = weight[:: max(1, len(weight) // LOOKED_AT)].float()
    error = (_rounded_to_int4(rows)[0] - rows).square().sum()
    return bool(error <= ON_GRID * rows.square().sum())


def _rounded_to_int4(weight: Tensor) -> tuple[Tensor, None]:
    integers, steps, lows = quantise_int4(weight)
    rounded = integers.view(*steps.shape, GROUP) * steps.float()[..., None] + lows.float()[..., None]
    return rounded.flatten(1)[:, : weight.shape[1]].to(weight.dtype), None


FLOAT32 = WeightFormat("float32", "cpu", torch.float32, _as_given)
INT8 = WeightFormat("int8", "cpu", torch.float32, quantise, rounds=True)
INT4 = WeightFormat("int4", "cpu", torch.float32, _rounded_to_int4, rounds=True, head=INT8)

BFLOAT16_HEAD = WeightFormat("bfloat16", "cuda", torch.bfloat16, _as_given, product=torch.float32)
"""Logits are not rounded to bfloat16, which has eight numbers between 16 and 17: equal ones are ties."""
BFLOAT16 = WeightFormat("bfloat16", "cuda", torch.bfloat16, _as_given, head=BFLOAT16_HEAD)
FP8 = WeightFormat("fp8", "cuda", torch.bfloat16, quantise_fp8, rounds=True, head=BFLOAT16_HEAD, multiple=16)
GPU_INT8 = WeightFormat(
    "int8", "cuda", torch.bfloat16, quantise, rounds=True, head=BFLOAT16_HEAD, multiple=16
)

AS_PUBLISHED = WeightFormat(
    "published", "cpu", torch.float32, quantise, rounds=True, head=INT8, published=True
)
"""4 bits for what was published in 4 bits, which loses nothing by it, 8 for the rest."""

WEIGHT_FORMATS = {form.name: form for form in (FLOAT32, INT8, INT4)}
"""Those that a weight may be stored in on a CPU, by name."""
WEIGHT_CHOICES = (*WEIGHT_FORMATS.values(), AS_PUBLISHED, BFLOAT16, FP8, GPU_INT8)
"""Those that a model's weights may be asked for in."""
