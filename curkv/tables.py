"""Tables: Markdown, whole or line by line, and plain columns for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def line(cells: Iterable[object]) -> str:
    """One row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def head(names: Sequence[str]) -> str:
    """The first two lines of a Markdown table, whose rows follow as they become known."""
    return f"{line(names)}\n{line(['---'] * len(names))}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join([head(header), *map(line, rows)])


def columns(header: Sequence[str], rows: Iterable[Sequence[str]], texts: int) -> str:
    """A table for a terminal: the first `texts` columns to the left, those of numbers to the right."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = [str.ljust if i < texts else str.rjust for i in range(len(widths))]
    padded = (
        [side(cell, width) for side, cell, width in zip(sides, cells, widths, strict=True)] for cells in lines
    )
    return "\n".join("  ".join(cells).rstrip() for cells in padded)
