"""Choosing the tokens to keep: what an implementation is, inputs, and costs."""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from curkv.kernels.costs import Cost
from curkv.kernels.spec import Call, Case, Inputs


class Select(Protocol):
    """See `reference.select`."""

    def __call__(  # noqa: D102
        self, scores: Tensor, lengths: Tensor, keep: Tensor, floor: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...


def _call(x: Inputs, shared: bool = False) -> Call:
    w, m = x.workload, x.workload.model
    lengths = x.rows()[1].view(m.layers, m.kv_heads)
    keep = torch.full_like(lengths, w.kept)
    scores = x.uniform(m.layers, m.kv_heads, w.tokens)
    return Call((scores, lengths, keep, keep // 5) if shared else (scores, lengths, keep))


CASES = (
    Case("", "evict", Cost("8*L*H*n", "8*L*H*n", "0", "scores, 6 times"), _call),
    Case(
        "shared by a layer",
        "evict",
        Cost("8*L*H*n", "8*L*H*n", "0", "scores, 12 times"),
        partial(_call, shared=True),
    ),
)
