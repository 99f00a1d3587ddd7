"""Quantities as a user writes them: `25%`, `0.25`, `512`, `512tok`, `8MiB`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

UNITS = {"": 1, "b": 1} | {
    prefix.lower() + end: base**power
    for base, ends in ((1000, ("", "b")), (1024, ("i", "ib")))
    for power, prefix in enumerate("KMGT", 1)
    for end in ends
}
"""Bytes of each unit of memory, in lower case, none for bytes: k and kb are 1,000, ki and kib 1,024."""

_QUANTITY = re.compile(r"([0-9]{1,18})(\.[0-9]{1,18})?\s*([a-z]+|%)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number and its unit.

    Attributes:
        number: 0 or more.
        whole: it was written without a decimal point.
        unit: in lower case; empty if there is none.
    """

    number: Decimal
    whole: bool
    unit: str

    @property
    def bytes(self) -> int | None:
        """Rounded down; None if the unit is none of memory."""
        factor = UNITS.get(self.unit)
        return None if factor is None else int(self.number * factor)


def read_quantity(text: str) -> Quantity | None:
    """Reads a number with a unit or without; None if the text is something else."""
    match = _QUANTITY.fullmatch(text.strip())
    if match is None:
        return None
    digits, fraction, unit = match.groups()
    return Quantity(Decimal(digits + (fraction or "")), fraction is None, (unit or "").lower())


def parse_size(text: str) -> int:
    """Reads a size in bytes: `2GiB`, `512 MiB`, `1.5G`, `1048576`.

    Raises:
        ValueError: the text is no size.
    """
    quantity = read_quantity(text)
    size = None if quantity is None else quantity.bytes
    if size is None:
        raise ValueError(f"{text!r} is not a size such as 2GiB, 512MiB or 1073741824")
    return size


def format_size(size: int) -> str:
    """Writes a size with the largest binary unit of which it is a multiple."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size and size % UNITS[unit.lower()] == 0:
            return f"{size // UNITS[unit.lower()]}{unit}"
    return str(size)
