"""Picks the implementation of every kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any, Literal

import numpy as np
import torch

from curkv.kernels import KernelsName
from curkv.kernels.clamped_mul.spec import ClampedMul
from curkv.kernels.column_sums.spec import ColumnSums
from curkv.kernels.combine.spec import Combine
from curkv.kernels.compact.spec import Compact
from curkv.kernels.gather_rows.spec import GatherRows
from curkv.kernels.gelu_mul.spec import GeluMul
from curkv.kernels.leverage_scores.spec import LeverageScores
from curkv.kernels.linear.spec import GPU_CASES, GroupLinear, PackLinear
from curkv.kernels.paged_decode_attention.spec import PagedDecodeAttention
from curkv.kernels.paged_prefill_attention.spec import PagedPrefillAttention
from curkv.kernels.rms_norm.spec import RmsNorm
from curkv.kernels.rope.spec import Rope
from curkv.kernels.route.spec import Route
from curkv.kernels.select.spec import Select
from curkv.kernels.silu_mul.spec import SiluMul
from curkv.kernels.spec import Case
from curkv.kernels.store_kv.spec import StoreKV
from curkv.kernels.window_scores.spec import WindowScores


@dataclass(frozen=True)
class Backend:
    """A way to implement every operation.

    Attributes:
        name: As asked for, and of its module in the folder of each operation.
        devices: Kinds of devices it runs on; any if there are none.
        preferred_on: Kind of device for which "auto" takes it.
        replay: How a decode step over it can be noted and run again: as the list of launches that
            `cpu.workers.recording` notes, as a CUDA graph, or not at all.
    """

    name: Literal["cpu", "triton", "reference"]
    devices: tuple[str, ...]
    preferred_on: str | None
    replay: Literal["launches", "cuda graph"] | None


BACKENDS = (
    Backend("cpu", ("cpu",), "cpu", "launches"),
    Backend("triton", ("cuda", "cpu"), "cuda", "cuda graph"),
    Backend("reference", (), None, None),
)


@dataclass(frozen=True)
class Kernels:
    """One implementation of every operation; what each does is said in its `reference.py`.

    Attributes:
        backend: Whose they are.
    """

    backend: Backend
    rope: Rope
    store_kv: StoreKV
    paged_decode_attention: PagedDecodeAttention
    paged_prefill_attention: PagedPrefillAttention
    column_sums: ColumnSums
    window_scores: WindowScores
    leverage_scores: LeverageScores
    select: Select
    compact: Compact
    gather_rows: GatherRows
    rms_norm: RmsNorm
    silu_mul: SiluMul
    gelu_mul: GeluMul
    clamped_mul: ClampedMul
    route: Route
    combine: Combine
    pack_linear: PackLinear
    group_linear: GroupLinear


_FOLDERS = {
    "pack_linear": "linear",
    "group_linear": "linear",
    "round_rows": "linear",
    "scale_rows": "linear",
}


def get_kernels(name: KernelsName = "auto", device: str | torch.device = "cpu") -> Kernels:
    """Imports one implementation of every kernel; what is not asked for is never imported.

    Args:
        name: "cpu" (Numba), "triton" (GPUs; with TRITON_INTERPRET=1 also on CPU, slowly), "reference"
            (torch), or "auto": the fastest one for `device`.
        device: where the tensors lie.

    Returns:
        The kernels.

    Raises:
        ValueError: the name is unknown, "auto" knows nothing for the device, what was asked for does not run
            there, or Triton is not installed.
    """
    kind = torch.device(device).type
    wanted = f"device {kind!r}" if name == "auto" else f"the name {name!r}"
    found = [x for x in BACKENDS if (x.preferred_on == kind if name == "auto" else x.name == name)]
    if not found:
        known = ", ".join(x.name for x in BACKENDS)
        raise ValueError(f"there are no kernels for {wanted}; choose one of auto, {known}")
    backend = found[0]
    if backend.devices and kind not in backend.devices:
        raise ValueError(f"the kernels {backend.name!r} do not run on device {kind!r}")
    if backend.name == "triton":
        _check_triton(kind)
    return Kernels(backend, **{operation: load(operation, backend.name) for operation in operations()})


def operations() -> list[str]:
    """The name of every operation."""
    return [field.name for field in fields(Kernels) if field.name != "backend"]


def cases() -> Iterator[tuple[str, str, Case]]:
    """Every way in which an operation is called: its name, that with the case's label, and the case.

    Without those of linear layers, which are given weights first.
    """
    for operation in operations():
        folder = _FOLDERS.get(operation, operation)
        for case in import_module(f"curkv.kernels.{folder}.spec").CASES if folder == operation else ():
            yield operation, f"{operation}, {case.label}" if case.label else operation, case


def triton_cases() -> Iterator[tuple[str, str, Case]]:
    """The same, and those of what linear layers do on GPUs besides their product."""
    yield from cases()
    for operation, case in GPU_CASES:
        yield operation, f"{operation}, {case.label}" if case.label else operation, case


def load(operation: str, backend: str) -> Callable[..., Any]:
    """Imports one implementation of one operation."""
    module = import_module(f"curkv.kernels.{_FOLDERS.get(operation, operation)}.{backend}")
    kernel: Callable[..., Any] = getattr(module, operation)
    return kernel


def _check_triton(kind: str) -> None:
    try:
        triton = import_module("triton")
    except ModuleNotFoundError as error:
        raise ValueError("Triton's kernels need the package triton, 3.4 or newer") from error
    version = _release(triton.__version__)
    if version < (3, 4):
        raise ValueError(f"Triton's kernels need triton 3.4 or newer; {triton.__version__} is installed")
    if triton.knobs.runtime.interpret and version < (3, 7) and _release(np.__version__) >= (2, 4):
        installed = f"triton {triton.__version__} and numpy {np.__version__} are installed"
        raise ValueError(f"Triton's interpreter needs numpy below 2.4 or triton 3.7 or newer; {installed}")
    if kind == "cpu" and not triton.knobs.runtime.interpret:
        raise ValueError("Triton's kernels need a GPU; TRITON_INTERPRET=1 runs them on a CPU, very slowly")


def _release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(map(int, version.split(".")[:2]))
