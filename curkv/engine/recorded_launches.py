"""Decode steps on a CPU as lists of kernel launches, run again as one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from curkv.engine.replay import MadeStep
from curkv.kernels.cpu.workers import Memory, recording

_ALLOCATIONS = {torch.ops.aten.empty, torch.ops.aten.detach}


class RecordedLaunches:
    """Records the first step of each size; all recordings share the memory of what they compute."""

    name = "recorded launches"
    ahead = False

    def __init__(self) -> None:
        self._memory = Memory()

    def size(self, count: int, most: int) -> int:
        """No rows are added: a list is recorded as fast as it runs."""
        return count

    def make(self, step: Callable[[], Tensor]) -> MadeStep:
        """Runs a step and keeps its launches.

        Raises:
            RuntimeError: something in it is no launch of a kernel.
        """
        with recording(self._memory) as recorded, _LaunchesOnly():  # type: ignore[no-untyped-call]
            logits = self._memory.unowned(step())
        return MadeStep(recorded.run, logits)


class _LaunchesOnly(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises where torch computes something, which a recording would leave out."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: to skip it, torch would import its compiler, which takes 100 MB."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not (func.is_view or func.overloadpacket in _ALLOCATIONS):
            raise RuntimeError(f"{func} cannot be recorded: it is no launch of a kernel")
        return func(*args, **(kwargs or {}))
