"""Where the tokens of a head stand in the text, and what of them a window leaves to a query."""

from __future__ import annotations

from curkv.kernels.cpu.jit import inlined
from curkv.kernels.cpu.memory import load_int32


@inlined
def position_of(position: int, table: int, page_size: int, token: int) -> int:
    """The position of a token, by the addresses of `Pages.position` and of its head's row of the table."""
    page = load_int32(table + 4 * (token // page_size))
    found: int = load_int32(position + 4 * (page * page_size + token % page_size))
    return found


@inlined
def first_in_window(position: int, table: int, page_size: int, last: int, newest: int, window: int) -> int:
    """The first token, at most the `last` one, of the `window` positions that end with `newest`.

    0 without a window, which is one of 0. Tokens are sorted by position.
    """
    low, high = 0, last
    if window > 0:
        while low < high:
            middle = (low + high) // 2
            if position_of(position, table, page_size, middle) > newest - window:
                high = middle
            else:
                low = middle + 1
    return low
