"""How much of a sequence's cache may be kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from curkv.cache.layout import CacheLayout
from curkv.units import read_quantity

_UNITS = frozenset({"b", "kb", "mb", "gb", "kib", "mib", "gib"})
_FORMS = "use a share like 25% or 0.25, tokens per head like 512 or 512tok, or bytes like 8MiB"


@dataclass(frozen=True, slots=True)
class Budget:
    """What a request allows its cache to hold.

    Attributes:
        kind: "ratio" of the prompt's tokens, "tokens" per head on average, "bytes" in the pool.
        value: Above 0; a ratio is at most 1, tokens and bytes are whole numbers.
    """

    kind: Literal["ratio", "tokens", "bytes"]
    value: float

    def __str__(self) -> str:
        if self.kind == "ratio":
            return f"{self.value * 100:.15g}%"
        return f"{int(self.value)}{'tok' if self.kind == 'tokens' else 'B'}"

    def tokens(self, prompt_tokens: int, layout: CacheLayout, *, ragged: bool = False, slack: int = 0) -> int:
        """Resolve to tokens per head, on average over the heads of a layer.

        A byte budget bounds the pages held, side arrays and unused slots of last pages included; with ragged
        heads it counts with the worst split of tokens over heads, almost a page more for each.

        Args:
            prompt_tokens: Length of the prompt.
            layout: Shape of the cache.
            ragged: Heads of a layer may hold different numbers of tokens.
            slack: Tokens per head that come on top before the next eviction; only a byte budget has to hold
                them.

        Returns:
            Tokens per head; below 1 if a byte budget does not hold one.
        """
        if self.kind == "ratio":
            return max(1, math.floor(prompt_tokens * self.value + 1e-9))
        if self.kind == "tokens":
            return int(self.value)
        pages = int(self.value) // layout.page_bytes
        return layout.sequence_tokens(pages, ragged=ragged) - slack


def parse_budget(value: object) -> Budget:
    """Read a budget as a header or a JSON body gives it.

    A number with a decimal point is a ratio and one without counts tokens: "1" is one token, "1.0" is
    everything.

    Args:
        value: "25%", "0.25", "512", "512tok", "8MiB" (also B, KB, MB, GB, KiB, GiB), or a JSON number.

    Returns:
        The budget.

    Raises:
        ValueError: with a message for the user.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"expected a number or a string; {_FORMS}")
    quantity = read_quantity(str(value))
    if quantity is None:
        raise ValueError(f"{str(value)[:40]!r} is no budget; {_FORMS}")
    number, unit = float(quantity.number), quantity.unit
    if number == 0:
        raise ValueError(f"{str(value)[:40]!r} keeps nothing; {_FORMS}")
    if unit == "%" or not (unit or quantity.whole):
        ratio = number / 100 if unit else number
        if ratio > 1:
            raise ValueError(f"{str(value)[:40]!r} is more than everything; {_FORMS}")
        return Budget("ratio", ratio)
    if unit in ("", "tok", "token", "tokens"):
        if not quantity.whole:
            raise ValueError(f"{str(value)[:40]!r}: tokens are whole; {_FORMS}")
        return Budget("tokens", int(quantity.number))
    num_bytes = quantity.bytes
    if num_bytes is None or unit not in _UNITS:
        raise ValueError(f"{str(value)[:40]!r} has an unknown unit; {_FORMS}")
    if num_bytes < 1:
        raise ValueError(f"{str(value)[:40]!r} keeps nothing; {_FORMS}")
    return Budget("bytes", num_bytes)
