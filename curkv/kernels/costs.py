"""What each operation must move and compute, as formulas over the shapes of a call.

Letters, all counts unless said otherwise:
    B sequences, T new tokens of all sequences, c new tokens of each, n stored tokens of each head, k tokens
    kept, L layers, H KV heads, Q query heads, G = Q / H, D head_dim, P page_size, w window queries, r sketch
    rank, d hidden size, I intermediate size, s bytes of a stored element, e bytes of a stored vector's scales
    (0 if there are none), a bytes of an activation, S splits, p programs.

`minimum` is what any implementation moves: inputs and outputs once. `moved` is what the kernels move between
the device's memory and its L2 cache. What they read again out of L2 is named in `again`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Formulas of one operation.

    Attributes:
        minimum: Bytes that must be moved.
        moved: Bytes that are moved.
        flops: Floating-point operations of the dots, or of the arithmetic where there is no dot.
        again: What is read again from L2, in words.
    """

    minimum: str
    moved: str
    flops: str
    again: str = ""


def evaluate(formula: str, shapes: Mapping[str, float]) -> float:
    """Value of a formula for the shapes of a call."""
    return float(eval(formula, {"__builtins__": {}}, dict(shapes)))
