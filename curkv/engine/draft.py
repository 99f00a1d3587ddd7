"""What an answer would look at: its first tokens are drafted with the whole cache, and forgotten again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from curkv.cache.observations import Needs

if TYPE_CHECKING:
    from curkv.engine.runner import Runner


def look_ahead(runner: Runner, slot: int, first: Tensor, start: int, count: int) -> Tensor:
    """Drafts an answer greedily, as in Lookahead Q-Cache (https://arxiv.org/abs/2505.20334).

    The tokens never come to the host, so that it does not wait for them on a GPU.

    Args:
        runner: Computes tokens.
        slot: The sequence, which holds its whole prompt; afterwards it holds what it held before.
        first: int64 [1], the answer's first token.
        start: Its logical position.
        count: Tokens to compute, one at least.

    Returns:
        The most attention that any of them pays each stored token, over the group of query heads too:
        float32 [L, H, n], whatever it is past a head's length.

    Raises:
        OutOfPages: There is no room for them.
    """
    kv = runner.kv
    mark = kv.mark([slot])
    kv.observe(slot, Needs(queries=count))
    try:
        token = first
        for position in range(start, start + count):
            token = runner.decode(slot, token, position).argmax(-1)
        view = runner.attention.view(slot)
        paid = kv.kernels.window_scores(
            view.queries(count), view.pages, *view.rows, view.scale, "max",
            width=view.width, softcap=view.softcap, sinks=view.sink_rows,
        )  # fmt: skip
        return paid.view(*view.lengths.shape, -1)[..., : view.width - count]
    finally:
        kv.retract(mark)
