"""Long answers that go on in one right way: a list once more, a count, and a state that is kept track of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from random import Random

from curkv.evaluation.tasks.base import Asked, CountTokens, Recipe, Sample

_SHOWN = 12
"""Items of a count or a state that the prompt shows."""

_SPARE_TOKENS = 8
"""Tokens that an answer may have beyond the right ones."""

_NAMES = (
    "Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Irene", "Jack", "Karen", "Leo",
    "Mary", "Nina", "Oscar", "Paul", "Quentin", "Rose", "Sam", "Tom", "Ursula", "Victor", "Wendy",
)  # fmt: skip

_COPIED = 13
"""Most items of a copy: of more a small model loses its place."""


@dataclass(frozen=True)
class Series(Asked):
    """A question whose `answers` are the items of what follows the context, each with what is before it."""

    def right(self, text: str) -> int:
        """Counts the items before the first wrong one."""
        for index, item in enumerate(self.answers):
            if not text.startswith(item):
                return index
            text = text.removeprefix(item)
        return len(self.answers)

    def score(self, text: str) -> float:
        """Share of the items before the first wrong one."""
        return self.right(text) / len(self.answers)


def copy(recipe: Recipe, count_tokens: CountTokens) -> Sample:
    """Names with numbers, all of them once more: what is to be said stands far behind."""

    def make(items: int, random: Random) -> tuple[str, list[str]]:
        rows = [f"\n{name}: {random.randrange(1000, 10000)}" for name in random.sample(_NAMES, items + 1)]
        return f"A list:{''.join(rows)}\n\nThe same list again:{rows[0]}", rows[1:]

    return _longest(recipe, count_tokens, make, _COPIED)


def counting(recipe: Recipe, count_tokens: CountTokens) -> Sample:
    """Numbers, one after another."""

    def make(items: int, random: Random) -> tuple[str, list[str]]:
        first = random.randrange(100, 900)
        return _shown([f" {first + i}," for i in range(_SHOWN + items)])

    return _longest(recipe, count_tokens, make)


def state(recipe: Recipe, count_tokens: CountTokens) -> Sample:
    """A box that holds two balls more at each step, in whole sentences."""

    def make(items: int, random: Random) -> tuple[str, list[str]]:
        balls = random.randrange(100, 400)
        steps = range(_SHOWN + items)
        return _shown([f"\nStep {i + 1}: the box holds {balls + 2 * i} balls. Add 2." for i in steps])

    return _longest(recipe, count_tokens, make)


def _shown(items: Sequence[str]) -> tuple[str, list[str]]:
    return "".join(items[:_SHOWN]).strip(), list(items[_SHOWN:])


def _longest(
    recipe: Recipe,
    count_tokens: CountTokens,
    make: Callable[[int, Random], tuple[str, list[str]]],
    most: int | None = None,
) -> Sample:
    """The longest series of which context and answer fit into the recipe's length.

    Raises:
        ValueError: Not even a single item fits.
    """
    found: Sample | None = None
    for items in count(1) if most is None else range(1, most + 1):
        context, following = make(items, Random(f"{recipe.task} {recipe.seed}"))
        answer = "".join(following)
        if count_tokens(context + answer) > recipe.length:
            break
        limit = count_tokens(answer) + _SPARE_TOKENS
        found = Sample(recipe, context, (Series("", tuple(following), answer, limit),))
    if found is None:
        raise ValueError(f"{recipe.task} does not fit into {recipe.length} tokens")
    return found
