"""Attention of one token per sequence: what an implementation is, inputs, and costs."""

from __future__ import annotations

from functools import partial
from typing import Protocol

from torch import Tensor

from curkv.kernels.costs import Cost
from curkv.kernels.pages import Pages
from curkv.kernels.spec import Call, Case, Inputs


class PagedDecodeAttention(Protocol):
    """See `reference.paged_decode_attention`."""

    def __call__(  # noqa: D102
        self,
        q: Tensor,
        pages: Pages,
        table: Tensor,
        lengths: Tensor,
        slots: Tensor,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor: ...


def _call(x: Inputs, masked: bool = False) -> Call:
    sequences = x.workload.sequences
    arguments = x.qkv(sequences)[0], x.pages, *x.attended(sequences), x.scale
    return Call(arguments, x.masks() if masked else {})


CASES = (
    Case(
        "",
        "decode",
        Cost(
            "B*H*n*(2*D*s + 2*e) + 2*B*Q*D*a",
            "B*H*n*(2*D*s + 2*e + 4/P) + 2*B*Q*D*a + 8*(p + B*H)*G*(D + 1)",
            "4*B*Q*n*D",
        ),
        _call,
        reads_vectors=True,
    ),
    Case(
        "masked",
        "decode",
        Cost(
            "B*H*n*(2*D*s + 2*e) + 2*B*Q*D*a",
            "B*H*n*(2*D*s + 2*e + 4/P) + 2*B*Q*D*a + 8*(p + B*H)*G*(D + 1)",
            "4*B*Q*n*D",
        ),
        partial(_call, masked=True),
        reads_vectors=True,
    ),
)
