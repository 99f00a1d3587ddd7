"""How evenly decode attention divides ragged heads among the programs of a GPU; needs none.

    python benchmarks/gpu/balance.py

Prints the share of perfectly balanced that a launch reaches: tokens of all heads by the time of the longest
program, where a token takes a unit of time and each piece of a head a fixed number of them. Programs that
run at once are taken to get the same bandwidth, though a lonely one gets more: losses are upper bounds.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from math import ceil
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from curkv.bench.script import script
from curkv.kernels.paged_decode_attention.triton import LEAST_UNITS, UNIT, num_programs
from curkv.tables import head, line

Lengths = NDArray[np.int64]
HEADS, BEGIN, MOST = 8, 40, 131072
"""KV heads of a sequence; what a piece costs beside its tokens, in tokens; the longest context."""
PER_PROCESSOR = 4


def mixes(seed: int = 0) -> Iterator[tuple[str, Lengths]]:
    """Lengths of heads, [sequences, HEADS]; uneven as measured for snapcur (0.25) and adasnapkv (0.41)."""
    rng = np.random.default_rng(seed)
    for batch in (1, 8, 32, 64):
        for tokens in (2048, 2320, 8192):
            yield f"{batch} of {tokens:,}", np.full((batch, HEADS), tokens)
        for spread in (0.25, 0.41):
            uneven = np.clip(rng.normal(2048, spread * 2048, (batch, HEADS)), 100, None).astype(np.int64)
            yield f"{batch} of 2,048, heads uneven by {spread}", uneven
        mixed = np.full((batch, HEADS), 2048)
        mixed[: max(1, batch // 8)] = 32768
        yield f"{batch}, one in eight of 32,768, others of 2,048", mixed


def by_number(lengths: Lengths, resident: int) -> list[int]:
    """Work of programs if each head is cut into the same number of pieces of multiples of 256 tokens."""
    splits = max(1, min(ceil(resident / lengths.size), MOST // 256))
    work: list[int] = []
    for split in range(splits):
        for length in lengths.T.ravel():
            size = max(ceil(length / splits / 256), 1) * 256
            tokens = max(0, min(size, int(length) - split * size))
            work.append(tokens + BEGIN if tokens or not split else 2)
    return work


def by_units(lengths: Lengths, resident: int) -> list[int]:
    """Work of programs that take equal shares of the units of all heads, as the kernel does."""
    ends = np.cumsum(-(-lengths.ravel() // UNIT.value) + 1)
    programs = num_programs(lengths.size, MOST, resident)
    share = max(ceil(ends[-1] / programs), LEAST_UNITS.value)
    work = []
    for first in range(0, int(ends[-1]), share):
        last, work_here = min(first + share, int(ends[-1])), 0
        row = int(np.searchsorted(ends, first, side="right"))
        while first < last:
            begin = int(ends[row - 1]) if row else 0
            start = max(first - begin - 1, 0) * UNIT.value
            end = min((last - begin - 1) * UNIT.value, int(lengths.flat[row]))
            work_here += max(0, end - start) + BEGIN
            first, row = int(ends[row]), row + 1
        work.append(work_here)
    return work


def balance(lengths: Lengths, work: list[int], resident: int) -> float:
    """Share of balanced, if `resident` programs run at once and each that ends makes room for the next."""
    running = [0] * resident
    for took in work:
        heapq.heapreplace(running, running[0] + took)
    return float(lengths.sum() / resident / max(running))


def main(
    processors: Annotated[int, typer.Option(help="Streaming multiprocessors; 132 is an H100 or H200.")] = 132,
) -> None:
    """Prints a row for each mix of lengths."""
    resident = PER_PROCESSOR * processors
    print(head(["sequences", "pieces by number", "equal shares"]))
    for name, lengths in mixes():
        cells = [balance(lengths, rule(lengths, resident), resident) for rule in (by_number, by_units)]
        print(line([name, *(f"{cell:.2f}" for cell in cells)]))


app = script(__doc__, main)

if __name__ == "__main__":
    app()
