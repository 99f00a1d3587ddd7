"""All options that a request can give, gathered from who declares them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from curkv.cache.allocation import ALLOCATIONS, Allocation
from curkv.cache.declarations import Kind, options_of, plain_defaults
from curkv.cache.options import EvictionOptions
from curkv.cache.policies import get_policy, policy_names
from curkv.cache.policies.base import Policy


@dataclass(frozen=True)
class Owner:
    """Somebody who has an option.

    Attributes:
        name: Of the policy or allocation, or "" for what every policy has.
        field: The option of a request that chooses the owner: "policy" or "allocation", or "".
        default: The option's value unless told.
        sentence: What the option is there.
        fixed: Whether neither a preset nor another policy changes the default.
    """

    name: str
    field: str
    default: Any
    sentence: str
    fixed: bool = True


@dataclass(frozen=True)
class Entry:
    """An option and who has it.

    Attributes:
        name: The field of a request.
        kind: The values it takes.
        owners: Who has it.
        examples: Values of it.
    """

    name: str
    kind: Kind
    owners: tuple[Owner, ...]
    examples: tuple[Any, ...] = ()

    @property
    def common(self) -> bool:
        """Whether it is an option of every policy."""
        return not self.owners[0].field

    @property
    def default(self) -> Any:
        """The one default of all owners; None if they differ, or it depends on something else."""
        first, *others = self.owners
        one = first.fixed and all(other.fixed and other.default == first.default for other in others)
        return first.default if one else None

    @property
    def description(self) -> str:
        """What it is, in the words of all owners."""
        return " ".join(dict.fromkeys(owner.sentence for owner in self.owners))

    @property
    def schema(self) -> dict[str, Any]:
        """JSON schema of the field."""
        schema = {**self.kind.schema, "description": self.description}
        if self.examples:
            schema["examples"] = list(self.examples)
        if not self.common and self.default is not None:
            schema["default"] = self.default
        return schema


@cache
def catalogue() -> dict[str, Entry]:
    """Every option by its name, those that all policies have first."""
    common = {
        name: Entry(
            name, declared.kind, (Owner("", "", _COMMON[name], declared.sentence),), declared.examples
        )
        for name, declared in options_of(EvictionOptions).items()
    }
    found: dict[str, Entry] = {}
    for field, owner in _owners():
        for name, declared in options_of(type(owner)).items():
            fixed = not declared.yields and declared.preset is None
            new = Owner(owner.name, field, getattr(owner, name), declared.sentence, fixed)
            known = found.get(name)
            found[name] = Entry(name, declared.kind, (*(known.owners if known else ()), new))
    return common | found


_COMMON = plain_defaults(EvictionOptions)


def _owners() -> Iterator[tuple[str, Policy | Allocation]]:
    """Whoever has options of their own."""
    yield from (("policy", get_policy(name)) for name in policy_names())
    yield from (("allocation", allocation) for allocation in ALLOCATIONS.values())
