"""Decode steps captured as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from curkv.engine.replay import MadeStep


class CudaGraphs:
    """Captures steps of the sizes 1, 2, 4, ... before requests come; all share one pool of memory.

    The host then waits for nothing within a step but its logits.
    """

    name = "CUDA graphs"
    ahead = True

    def size(self, count: int, most: int) -> int:
        """The next power of two, or `most`."""
        return int(min(1 << (count - 1).bit_length(), most))

    def make(self, step: Callable[[], Tensor]) -> MadeStep:
        """Captures a step, after running it once outside a graph.

        Raises:
            RuntimeError: there is no GPU, or it cannot be captured.
        """
        pool = self._pool
        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            logits = step()
        return MadeStep(graph.replay, logits)

    @cached_property
    def _pool(self) -> Any:
        return torch.cuda.graph_pool_handle()
