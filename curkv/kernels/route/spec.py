"""Which experts each token runs through: what an implementation is, inputs, and costs."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from curkv.kernels.costs import Cost
from curkv.kernels.spec import Call, Case, Inputs


class Routes(NamedTuple):
    """Who runs through what: T tokens through k of E experts each.

    Attributes:
        tokens: int64 [T k], sorted by expert.
        places: int64 [T, k], where among them a token is for each of its experts.
        shares: float32 [T, k], what the results of these are multiplied with.
        groups: int64 [min(E, T k), 3]: an expert, where its tokens begin, their number; behind those that
            have any, zeros.
    """

    tokens: Tensor
    places: Tensor
    shares: Tensor
    groups: Tensor


class Route(Protocol):
    """See `reference.route`."""

    def __call__(self, logits: Tensor, chosen: int, normalised: bool) -> Routes: ...  # noqa: D102


EXPERTS, CHOSEN = 8, 2
"""Of Mixtral."""


def _call(normalised: bool) -> Case:
    def call(x: Inputs) -> Call:
        return Call((x.uniform(x.workload.chunk, EXPERTS), CHOSEN, normalised))

    cost = Cost(f"{4 * EXPERTS + 20 * CHOSEN}*T", f"{4 * EXPERTS + 20 * CHOSEN}*T", f"{EXPERTS * CHOSEN}*T")
    return Case("shares of the chosen" if normalised else "shares of all", "prefill", cost, call)


CASES = (_call(True), _call(False))
