"""Moving kept tokens to the front: what an implementation is, inputs, and costs."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from curkv.kernels.costs import Cost
from curkv.kernels.pages import Pages
from curkv.kernels.spec import Call, Case, Inputs


class Compact(Protocol):
    """See `reference.compact`."""

    def __call__(  # noqa: D102
        self, pages: Pages, source: Tensor, target: Tensor, indices: Tensor, counts: Tensor
    ) -> None: ...


def _call(x: Inputs) -> Call:
    w = x.workload
    table, _ = x.rows()
    kept = x.uniform(len(table), w.tokens).topk(w.kept).indices.sort().values.int()
    counts = torch.full((len(table),), w.kept, dtype=torch.int32, device=x.device)
    return Call((x.pages, table, table, kept, counts), written=tuple(x.pages.arrays.values()))


CASES = (
    Case(
        "",
        "evict",
        Cost(
            "L*H*k*(2*(2*D*s + 2*e + 16) + 4)",
            "L*H*k*(2*(2*D*s + 2*e + 16) + 4 + 8/P)",
            "0",
            "indices",
        ),
        _call,
        reads_vectors=True,
    ),
)
