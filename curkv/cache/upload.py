"""Bringing what the host knows to the device without waiting for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def upload(x: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor of the host to a GPU from pinned memory, in the order of the stream.

    On a CPU it is the tensor itself.
    """
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def upload_list(values: Iterable[Any], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Makes a tensor of numbers on a device, as `upload`."""
    return upload(torch.tensor(list(values), dtype=dtype), device)
