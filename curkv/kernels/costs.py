"""What each operation must move and compute, as formulas over the shapes of a call.

Letters, all counts unless said otherwise:
    B sequences, T new tokens of all sequences, c new tokens of each, n stored tokens of each head, k tokens
    kept, L layers, H KV heads, Q query heads, G = Q / H, D head_dim, P page_size, w window queries, r sketch
    rank, d hidden size, I intermediate size, s bytes of a stored element, e bytes of a stored scale (0 if
    there are none), a bytes of an activation, S splits.

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


COSTS = {
    "rope": Cost("2*T*Q*D*a + 4*T*D", "2*T*Q*D*a + 4*T*D + 4*T", "3*T*Q*D"),
    "store_kv": Cost(
        "T*H*(2*D*(a + s) + 2*e + 16) + 4*T*D", "T*H*(2*D*(a + s) + 2*e + 16 + 8) + 4*T*D + 4*T", "7*T*H*D"
    ),
    "paged_decode_attention": Cost(
        "B*H*n*(2*D*s + 2*e) + 2*B*Q*D*a",
        "B*H*n*(2*D*s + 2*e + 4/P) + 2*B*Q*D*a + 8*B*Q*S*(D + 1)*(S > 1)",
        "4*B*Q*n*D",
    ),
    "paged_decode_attention, accumulate": Cost(
        "B*H*n*(2*D*s + 2*e + 8) + 2*B*Q*D*a",
        "B*H*n*(2*D*s + 2*e + 8 + 8/P + 8*G) + 2*B*Q*D*a + 8*B*Q*S*(D + 1)*(S > 1)",
        "4*B*Q*n*D",
    ),
    "paged_prefill_attention": Cost(
        "B*H*n*(2*D*s + 2*e) + 2*T*Q*D*a",
        "B*H*n*(2*D*s + 2*e + 4/P) + 2*T*Q*D*a + 4*T*Q",
        "4*B*Q*D*c*(n - c/2)",
        "K and V for each tile of queries",
    ),
    "column_sums": Cost(
        "B*H*n*(D*s + e + 8) + T*Q*(D*a + 4)",
        "B*H*n*(D*s + e + 8 + 4/P) + T*Q*(D*a + 4)",
        "2*B*Q*D*c*(n - c/2)",
        "queries for each block of keys",
    ),
    "window_scores": Cost(
        "2*L*H*n*(D*s + e + 4) + 4*L*H*n + L*Q*w*D*a",
        "2*L*H*n*(D*s + e + 4 + 4/P) + 4*L*H*n + L*Q*w*(D*a + 8*S)",
        "4*L*Q*w*n*D",
        "queries for each block of keys",
    ),
    "window_scores, lse given": Cost(
        "L*H*n*(D*s + e + 8) + L*Q*w*(D*a + 4)",
        "L*H*n*(D*s + e + 8 + 4/P) + L*Q*w*(D*a + 4)",
        "2*L*Q*w*n*D",
        "queries for each block of keys",
    ),
    "leverage_scores": Cost("12*L*H*n", "L*H*n*(12 + 4/P)", "8*L*H*n", "both energies, for the row's sum"),
    "leverage_scores, sketch": Cost(
        "L*H*n*(2*D*s + 2*e + 4)",
        "L*H*n*(2*D*s + 2*e + 4 + 4/P + 16)",
        "8*L*H*n*D*r",
        "both energies, for the row's sum",
    ),
    "select": Cost("L*H*(4*n + 4*k)", "L*H*(4*n + 4*k)", "0", "scores, 5 times"),
    "select, shared by a layer": Cost("L*H*(4*n + 4*k)", "L*H*(4*n + 4*k)", "0", "scores, 10 times"),
    "compact": Cost(
        "L*H*k*(2*(2*D*s + 2*e + 16) + 4)", "L*H*k*(2*(2*D*s + 2*e + 16) + 4 + 8/P)", "0", "indices"
    ),
    "rms_norm": Cost("4*T*d*a + d*a", "4*T*d*a + d*a", "5*T*d"),
    "silu_mul": Cost("3*T*I*a", "3*T*I*a", "5*T*I"),
}


def evaluate(formula: str, shapes: Mapping[str, int]) -> float:
    """Value of a formula of `COSTS` for the shapes of a call."""
    return float(eval(formula, {"__builtins__": {}}, dict(shapes)))
