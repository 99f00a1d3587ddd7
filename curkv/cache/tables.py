"""The policies' options as the command line and the documentation show them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from curkv.cache.catalogue import Entry, catalogue


def options_of_policy(name: str) -> list[str]:
    """A line for every option that a policy has of its own: name, values, default and what it is."""
    return [
        f"{entry.name} ({entry.kind.words.replace('`', '')}; {_shown(owner.default)}): {owner.sentence}"
        for entry in catalogue().values()
        for owner in entry.owners
        if owner.field == "policy" and owner.name == name
    ]


def common_table() -> list[str]:
    """The options that every policy has, in Markdown."""
    return _table(
        ("`kv.`", "values", "", "unless told"),
        (
            (f"`{entry.name}`", entry.kind.words, entry.description, _shown(entry.default))
            for entry in catalogue().values()
            if entry.common
        ),
    )


def own_table() -> list[str]:
    """The options that some policies and allocations have, in Markdown."""
    return _table(
        ("`kv.`", "values", "", "of, and its default"),
        (
            (f"`{entry.name}`", entry.kind.words, entry.description, "; ".join(_owners(entry)))
            for entry in catalogue().values()
            if not entry.common
        ),
    )


def _owners(entry: Entry) -> Iterator[str]:
    """Who has an option, those with the same default together."""
    by_default: dict[str, list[str]] = {}
    for owner in entry.owners:
        by_default.setdefault(_shown(owner.default), []).append(f"`{owner.name}`")
    for default, names in by_default.items():
        yield f"{', '.join(names)}: {default}"


def _shown(value: Any) -> str:
    """How a default is written; what is not said depends on policy, preset and prompt."""
    if value is None or value == ():
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heads, ("---",) * len(heads), *rows)]
