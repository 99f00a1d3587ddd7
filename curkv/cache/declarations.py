"""Options declared once, as fields of dataclasses: what values they take, their default, and one sentence."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, Self

from curkv.cache.presets import PRESETS, Preset


class Kind(ABC):
    """The values that an option takes, and how a header or JSON writes them."""

    @abstractmethod
    def parse(self, value: object) -> Any:
        """Read a value.

        Args:
            value: A string, or what JSON has for it.

        Raises:
            ValueError: it is none; with a message for the user.
        """

    @property
    @abstractmethod
    def schema(self) -> dict[str, Any]:
        """JSON schema of what `parse` reads."""

    @property
    @abstractmethod
    def words(self) -> str:
        """The values in a few words, for a table."""


@dataclass(frozen=True)
class Integer(Kind):
    """A whole number.

    Attributes:
        low: The least.
        high: The greatest.
        odd: Even ones are refused.
    """

    low: int
    high: int = 2**31 - 1
    odd: bool = False

    def parse(self, value: object) -> int:
        """Read it; 1.0 and true are no integers."""
        text = str(value).strip()
        written = re.fullmatch(r"[+-]?[0-9]{1,20}", text) and not isinstance(value, bool)
        number = int(text) if written else None
        if number is None or not self.low <= number <= self.high or (self.odd and number % 2 == 0):
            kind = "an odd integer" if self.odd else "an integer"
            raise ValueError(f"expected {kind} from {self.low} to {self.high}, not {str(value)[:40]!r}")
        return number

    @property
    def schema(self) -> dict[str, Any]:
        """An integer in these bounds, or a string that writes one."""
        number: dict[str, Any] = {"type": "integer", "minimum": self.low, "maximum": self.high}
        if self.odd:
            number["not"] = {"multipleOf": 2}
        return {"anyOf": [number, {"type": "string", "pattern": "^ *[+-]?[0-9]{1,20} *$"}]}

    @property
    def words(self) -> str:
        """The bounds; those that are only the machine's are left out."""
        if self.low < -(2**31):
            return "an integer"
        bounds = f"from {self.low}" if self.high == 2**31 - 1 else f"{self.low} to {self.high}"
        return f"{bounds}, odd" if self.odd else bounds


@dataclass(frozen=True)
class Number(Kind):
    """A number that need not be whole.

    Attributes:
        low: The least.
        high: The greatest; None: there is none.
    """

    low: float
    high: float | None = None

    def parse(self, value: object) -> float:
        """Read it, without sign or exponent."""
        text = str(value).strip()
        number = float(text) if re.fullmatch(r"[0-9]{1,18}(\.[0-9]{1,18})?", text) else None
        if number is None or number < self.low or (self.high is not None and number > self.high):
            raise ValueError(f"expected a number {self.words}, not {str(value)[:40]!r}")
        return number

    @property
    def schema(self) -> dict[str, Any]:
        """A number in these bounds, or a string that writes one."""
        number: dict[str, Any] = {"type": "number", "minimum": self.low}
        if self.high is not None:
            number["maximum"] = self.high
        return {"anyOf": [number, {"type": "string", "pattern": r"^ *[0-9]{1,18}(\.[0-9]{1,18})? *$"}]}

    @property
    def words(self) -> str:
        """The bounds."""
        return f"from {self.low:g}" if self.high is None else f"from {self.low:g} to {self.high:g}"


SHARE = Number(0, 1)
"""A part of a whole."""


@dataclass(frozen=True)
class Choice(Kind):
    """One of some words.

    Attributes:
        values: The words, in lower case.
    """

    values: tuple[str, ...]

    def parse(self, value: object) -> str:
        """Read it in any case."""
        name = value.strip().lower() if isinstance(value, str) else None
        if name not in self.values:
            raise ValueError(f"expected one of {', '.join(self.values)}, not {str(value)[:40]!r}")
        return name

    @property
    def schema(self) -> dict[str, Any]:
        """The words."""
        return {"enum": list(self.values)}

    @property
    def words(self) -> str:
        """The words."""
        return ", ".join(f"`{value}`" for value in self.values)


@dataclass(frozen=True)
class Condition:
    """When an option does something.

    Attributes:
        option: Another option of the same object.
        value: A value of it.
        equal: Whether it has to have this value, or any but this.
    """

    option: str
    value: object
    equal: bool

    def holds(self, owner: object) -> bool:
        """Whether the option does something in an object whose fields are options."""
        return bool(getattr(owner, self.option) == self.value) == self.equal


def when(**option: object) -> Condition:
    """Declare that an option does something only if another one has this value."""
    [(name, value)] = option.items()
    return Condition(name, value, equal=True)


def unless(**option: object) -> Condition:
    """Declare that an option does nothing if another one has this value."""
    [(name, value)] = option.items()
    return Condition(name, value, equal=False)


@dataclass(frozen=True)
class Option:
    """What is declared of an option.

    Attributes:
        kind: The values it takes.
        sentence: What it is, for tables.
        effective: When it does something; None: always.
        yields: A policy that has no opinion of its own takes the one of the policy it is multiplied with.
        preset: Field of `Preset` that has its default; None: the default is the object's.
        examples: Values, for the API's description.
    """

    kind: Kind
    sentence: str
    effective: Condition | None = None
    yields: bool = False
    preset: str | None = None
    examples: tuple[Any, ...] = ()


def option(
    default: Any,
    kind: Kind,
    sentence: str,
    *,
    effective: Condition | None = None,
    yields: bool = False,
    preset: str | None = None,
    examples: tuple[Any, ...] = (),
) -> Any:
    """Declare a field of a dataclass as an option; the other arguments are those of `Option`.

    A subclass that gives the field another default keeps the declaration, but neither yields to another
    policy nor to a preset.
    """
    declaration = Option(kind, sentence, effective, yields, preset, examples)
    return field(default=default, metadata={"option": declaration})


def options_of(owner: type) -> Mapping[str, Option]:
    """The options that a dataclass declares or inherits, by field."""
    if owner not in _DECLARED:
        _DECLARED[owner] = _declared(owner)
    return _DECLARED[owner]


_DECLARED: dict[type, Mapping[str, Option]] = {}


def _declared(owner: type) -> Mapping[str, Option]:
    found: dict[str, Option] = {}
    for own in fields(owner):
        inherited = (vars(base).get("__dataclass_fields__", {}).get(own.name) for base in owner.__mro__)
        declared = [x.metadata["option"] for x in inherited if x is not None and "option" in x.metadata]
        if declared:
            keeps = "option" in own.metadata
            found[own.name] = declared[0] if keeps else replace(declared[0], yields=False, preset=None)
    return found


def plain_defaults(owner: type) -> dict[str, Any]:
    """Default of every option of a dataclass."""
    names = options_of(owner)
    return {x.name: x.default for x in fields(owner) if x.name in names and x.default is not MISSING}


@dataclass(frozen=True, kw_only=True)
class Configurable:
    """Something whose fields are its options.

    Attributes:
        preset: The settings that it follows where a request says nothing.
    """

    preset: Preset = PRESETS["serving"]

    def default(self, name: str, preset: Preset, other: Configurable | None = None) -> Any:
        """Value of an option that a request does not give, under a preset and beside another policy."""
        declared = options_of(type(self))[name]
        if declared.yields and other is not None and name in options_of(type(other)):
            return other.default(name, preset)
        return getattr(self, name) if declared.preset is None else getattr(preset, declared.preset)

    def configured(self, given: Mapping[str, Any], preset: Preset, other: Configurable | None = None) -> Self:
        """The same with the values that a request gives, and defaults for the rest.

        Args:
            given: Values by option; those of others are left out.
            preset: What the defaults follow.
            other: The policy that this one is multiplied with.
        """
        values = {
            name: given[name] if name in given else self.default(name, preset, other)
            for name in options_of(type(self))
        }
        return replace(self, preset=preset, **values)
