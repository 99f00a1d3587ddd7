"""Vectors of 4 bits a channel, in groups that have a step and a lowest value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from curkv.kernels.formats.base import Array, KVFormat, VectorFormat
from curkv.kernels.formats.int8 import Int8

GROUP = 32
"""Channels that have a step and a lowest value in common."""
LARGEST = 15
"""Largest of the codes; the least is 0."""


@dataclass(frozen=True)
class Int4(VectorFormat):
    """A lowest value plus a code, 0 to 15, times a step: both are float16, for each 32 channels.

    No element is off by more than half of the step, which is a 15th of what lies between the group's largest
    and lowest one, and by what the two lose as float16. They overflow where a float16 cache does.
    """

    name = "int4"
    multiple = 64

    def arrays(self, head_dim: int) -> dict[str, Array]:
        """The codes, of an even channel in a byte's low half; step and lowest value of each group."""
        return {
            "codes": Array((head_dim // 2,), torch.uint8),
            "ranges": Array((head_dim // GROUP, 2), torch.float16),
        }

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Rounds to the nearest code, after step and lowest value have been rounded."""
        groups = x.reshape(*x.shape[:-1], x.shape[-1] // GROUP, GROUP)
        low, high = groups.aminmax(dim=-1)
        ranges = torch.stack([(high - low) / LARGEST, low], -1).half()
        step, low = ranges.float().unbind(-1)
        factor = torch.where(step > 0, 1 / step, 0.0)
        codes = ((groups - low[..., None]) * factor[..., None]).round().clamp_(0, LARGEST).to(torch.uint8)
        even, odd = codes.view(*x.shape[:-1], x.shape[-1] // 2, 2).unbind(-1)
        return {"codes": even | odd << 4, "ranges": ranges}

    def decode(self, entries: Mapping[str, Tensor]) -> Tensor:
        """Multiplies and adds."""
        codes, (step, low) = entries["codes"], entries["ranges"].float().unbind(-1)
        channels = torch.stack([codes & 15, codes >> 4], -1).view(*step.shape, GROUP)
        vectors: Tensor = channels * step[..., None] + low[..., None]
        return vectors.flatten(-2)


FORMATS = {"k8v4": KVFormat("k8v4", Int8(), Int4()), "int4": KVFormat("int4", Int4(), Int4())}
