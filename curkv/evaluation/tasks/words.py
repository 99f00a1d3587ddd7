"""The words that RULER's tasks are made of, from the package wonderwords as there."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from random import Random


@cache
def words(kind: str) -> list[str]:
    """Lists words.

    Args:
        kind: "noun", "adjective" or "verb".

    Raises:
        ModuleNotFoundError: wonderwords is not installed.
    """
    try:
        assets = files("wonderwords.assets")
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "the tasks' word list is not installed: pip install 'curkv[eval]'"
        ) from None
    lines = assets.joinpath(f"{kind}list.txt").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip()]


@cache
def all_words() -> list[str]:
    """Every single word of the three kinds, in alphabetical order."""
    return sorted({word for kind in ("noun", "adjective", "verb") for word in words(kind) if " " not in word})


def draw_key(random: Random) -> str:
    """Draws a key like "wistful-toaster"."""
    return f"{random.choice(words('adjective'))}-{random.choice(words('noun'))}".replace(" ", "-")
