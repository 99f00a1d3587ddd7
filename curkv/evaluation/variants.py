"""What is compared: eviction options at a budget, written in one line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from curkv.cache.options import EvictionOptions
from curkv.cache.parsing import parse_options


@dataclass(frozen=True)
class Variant:
    """Eviction options under the name that tables give them.

    Attributes:
        policy: As the user wrote it: "curdkv", "curdkv preset=paper recent_tokens=0".
        budget: As the user wrote it, "" for the full cache.
        raw: The options as a request's `kv` object has them.
        options: The same, checked.
    """

    policy: str
    budget: str
    raw: dict[str, str] = field(compare=False)
    options: EvictionOptions = field(compare=False)

    @property
    def full(self) -> bool:
        """Whether nothing is evicted: the reference of all others."""
        return not self.budget

    @property
    def decoding(self) -> EvictionOptions:
        """The same with the budget for what is held while generating."""
        raw = dict(self.raw)
        if budget := raw.pop("budget", None):
            raw["decode_budget"] = budget
        return parse_options(raw)


def parse_variant(policy: str, budget: str) -> Variant:
    """Reads a policy and its options, separated by spaces.

    Args:
        policy: A policy's name, then options as key=value.
        budget: Of the prompt; "" for policy "full".

    Raises:
        OptionError: A value is wrong or contradicts another.
        ValueError: A word is no key=value.
    """
    name, *words = policy.split()
    raw = {"policy": name}
    for word in words:
        key, separator, value = word.partition("=")
        if not separator:
            raise ValueError(f"{policy!r}: expected key=value after the policy's name, not {word!r}")
        raw[key] = value
    if budget:
        raw["budget"] = budget
    return Variant(policy, budget, raw, parse_options(raw))


FULL = parse_variant("full", "")


def cross(policies: Iterable[str], budgets: Iterable[str]) -> list[Variant]:
    """Every policy at every budget, after the full cache, which each is held against."""
    budgets = list(budgets)
    others = [parse_variant(policy, budget) for policy in policies if policy != "full" for budget in budgets]
    return [FULL, *others]
