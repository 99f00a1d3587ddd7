"""What a module here has of its format: how Numba kernels write vectors and attend to them, query by query.

`row` (see `Primitives`) and `write` are all that a format must have. The other steps are those of decode
attention, which reads every vector for a few products only, so that arithmetic in the format's own numbers
may pay: here they multiply in float32 what `row` gives, and a format may replace them.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np

from curkv.kernels.cpu.jit import inlined
from curkv.kernels.cpu.lanes import broadcast
from curkv.kernels.cpu.memory import FLOAT32, store
from curkv.kernels.cpu.rows import MOST_ROWS, dot_rows, weigh_rows
from curkv.kernels.cpu.vectors import Primitives, by_format


@inlined
def block_rows(rows: int) -> int:
    """How many of the query heads that are left to take together; four are two times two."""
    return MOST_ROWS if rows == MOST_ROWS or rows >= 5 else min(rows, 2)


class CPUVectors(Primitives):
    """The primitives and the steps of decode attention; the latter are compiled into the kernel.

    In their arguments `vectors` are the primitives, and all that is no count is an address.
    """

    def scratch(self, group: int, dim: int, width: int) -> tuple[int, int]:
        """Bytes that a worker's scratch memory for queries and for weights must have, multiples of 4."""
        return 0, 0

    @staticmethod
    @abstractmethod
    def write(vectors: Any, source: int, dim: int, memory: Any, token: int) -> None:
        """Encode float32 [dim]."""

    @staticmethod
    def prefetch_page(vectors: Any, memory: Any, dim: int, token: int, tokens: int) -> None:
        """Fetch what will be read of `tokens` vectors besides the first array."""

    @staticmethod
    def round_queries(vectors: Any, group: int, dim: int, q: int, scratch: int) -> int:
        """Make float32 [group, dim] into queries as `score_page` takes them; returns where they are."""
        return q

    @staticmethod
    def score_page(
        vectors: Any, group: int, dim: int, queries: int, memory: Any, token: int, tokens: int, scores: int,
        width: int, ahead: int, scratch: int,
    ) -> None:  # fmt: skip
        """Write the scores [group, tokens] of a page's keys, four at a time: up to three too many.

        `ahead` is how far behind the page's first key lies what will be read next.
        """
        g = 0
        while g < group:
            rows = block_rows(group - g)
            query, target = queries + 4 * g * dim, scores + 4 * g * width
            dot_rows(vectors, rows, query, dim, memory, token, tokens, target, width, ahead)
            g += rows

    @staticmethod
    def round_weights(
        vectors: Any, group: int, dim: int, weights: int, width: int, memory: Any, table: int, page_size: int,
        count: int, scratch: int, out: int,
    ) -> None:  # fmt: skip
        """Make exponentials float32 [group, count] into weights as `weigh_page` takes them, and zero sums."""
        for g in range(group):
            for d in range(0, dim, 8):
                store(FLOAT32, out + 4 * (g * (dim + 2) + d), broadcast(np.float32(0.0)))

    @staticmethod
    def weigh_page(
        vectors: Any, group: int, dim: int, weights: int, width: int, start: int, memory: Any, token: int,
        tokens: int, out: int, ahead: int, scratch: int,
    ) -> None:  # fmt: skip
        """Add a page's values, weighted, to `out`, float32 [group, dim + 2]; `start` is its first token."""
        stride = dim + 2
        g = 0
        while g < group:
            rows = block_rows(group - g)
            row, target = weights + 4 * (g * width + start), out + 4 * g * stride
            wide = 64 if rows == 1 else 32
            body = dim - dim % wide
            for d in range(0, body, wide):
                place = target + 4 * d
                if rows == 1:
                    weigh_rows(vectors, 1, 8, row, width, memory, dim, token, d, tokens, place, stride, ahead)
                else:
                    weigh_rows(
                        vectors, rows, 4, row, width, memory, dim, token, d, tokens, place, stride, ahead
                    )
            for d in range(body, dim, 8):
                for r in range(rows):
                    single, place = row + 4 * r * width, target + 4 * (r * stride + d)
                    weigh_rows(
                        vectors, 1, 1, single, width, memory, dim, token, d, tokens, place, stride, ahead
                    )
            g += rows

    @staticmethod
    def finish(vectors: Any, group: int, dim: int, scratch: int, out: int) -> None:
        """Turn the sums into float32 [group, dim + 2] at `out`, if they are elsewhere."""


@by_format
def write(vectors: Any, source: int, dim: int, memory: Any, token: int) -> None:
    """`CPUVectors.write`."""


@by_format
def prefetch_page(vectors: Any, memory: Any, dim: int, token: int, tokens: int) -> None:
    """`CPUVectors.prefetch_page`."""


@by_format
def round_queries(vectors: Any, group: int, dim: int, q: int, scratch: int) -> Any:
    """`CPUVectors.round_queries`."""


@by_format
def score_page(
    vectors: Any, group: int, dim: int, queries: int, memory: Any, token: int, tokens: int, scores: int,
    width: int, ahead: int, scratch: int,
) -> None:  # fmt: skip
    """`CPUVectors.score_page`."""


@by_format
def round_weights(
    vectors: Any, group: int, dim: int, weights: int, width: int, memory: Any, table: int, page_size: int,
    count: int, scratch: int, out: int,
) -> None:  # fmt: skip
    """`CPUVectors.round_weights`."""


@by_format
def weigh_page(
    vectors: Any, group: int, dim: int, weights: int, width: int, start: int, memory: Any, token: int,
    tokens: int, out: int, ahead: int, scratch: int,
) -> None:  # fmt: skip
    """`CPUVectors.weigh_page`."""


@by_format
def finish(vectors: Any, group: int, dim: int, scratch: int, out: int) -> None:
    """`CPUVectors.finish`."""
