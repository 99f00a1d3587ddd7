"""Picks the implementation of every kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor

KernelsName = Literal["auto", "cpu", "triton", "reference"]


@dataclass(frozen=True)
class Kernels:
    """One implementation of every operation; signatures are in `curkv/kernels/<module>/reference.py`."""

    rope: Callable[..., None]
    store_kv: Callable[..., None]
    paged_decode_attention: Callable[..., Tensor]
    paged_prefill_attention: Callable[..., Any]
    window_scores: Callable[..., Tensor]
    column_sums: Callable[..., None]
    leverage_scores: Callable[..., Tensor]
    select: Callable[..., tuple[Tensor, Tensor]]
    compact: Callable[..., None]
    gather_rows: Callable[..., Tensor]
    rms_norm: Callable[..., Any]
    silu_mul: Callable[..., Tensor]
    pack_linear: Callable[..., Any]
    pack_linear_int8: Callable[..., Any]
    pack_linear_int4: Callable[..., Any]


_MODULES = dict.fromkeys(("pack_linear", "pack_linear_int8", "pack_linear_int4"), "linear")
_BACKENDS = ("cpu", "triton", "reference")
_AUTO = {"cpu": "cpu", "cuda": "triton"}


def get_kernels(name: KernelsName = "auto", device: str | torch.device = "cpu") -> Kernels:
    """Imports one implementation of every kernel; what is not asked for is never imported.

    Args:
        name: "cpu" (Numba), "triton" (GPUs; with TRITON_INTERPRET=1 also on CPU, slowly), "reference"
            (torch), or "auto": the fastest one for `device`.
        device: where the tensors lie; only read by "auto".

    Returns:
        The kernels.

    Raises:
        ValueError: the name is unknown, "auto" knows nothing for the device, or Triton is not installed or
            cannot run there.
    """
    kind = torch.device(device).type
    backend = _AUTO.get(kind) if name == "auto" else name
    if backend not in _BACKENDS:
        wanted = f"device {kind!r}" if name == "auto" else f"the name {name!r}"
        raise ValueError(f"there are no kernels for {wanted}; choose one of auto, {', '.join(_BACKENDS)}")
    if backend == "triton":
        _check_triton(kind)
    return Kernels(**{field.name: _load(field.name, backend) for field in fields(Kernels)})


def _check_triton(kind: str) -> None:
    try:
        triton = import_module("triton")
    except ModuleNotFoundError as error:
        raise ValueError("Triton's kernels need the package triton, 3.4 or newer") from error
    if kind == "cpu" and not triton.knobs.runtime.interpret:
        raise ValueError("Triton's kernels need a GPU; TRITON_INTERPRET=1 runs them on a CPU, very slowly")


def _load(operation: str, backend: str) -> Callable[..., Any]:
    module = import_module(f"curkv.kernels.{_MODULES.get(operation, operation)}.{backend}")
    kernel: Callable[..., Any] = getattr(module, operation)
    return kernel
