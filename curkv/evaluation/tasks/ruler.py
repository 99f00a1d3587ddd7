"""RULER's tasks that need no download, in its wording (https://arxiv.org/abs/2404.06654, appendix B).

Six of RULER's thirteen tasks: an average of them is not comparable with a published RULER score.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from math import pi
from random import Random
from uuid import UUID

from curkv.evaluation.tasks.base import CountTokens, Recipe, Sample, fit, insert
from curkv.evaluation.tasks.words import all_words, draw_key

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""The sentence that niah_single_1 and vt repeat; it flatters scores which look for outliers."""

_NIAH_NEW_TOKENS, _VT_NEW_TOKENS, _CWE_NEW_TOKENS, _FWE_NEW_TOKENS = 128, 30, 120, 50


def niah_single_1(recipe: Recipe, count_tokens: CountTokens) -> Sample:
    """One needle, word to number, in a repeated sentence."""
    return _niah(recipe, count_tokens, draw_key, draw_number, "number", haystack=lambda random: NOISE)


def niah_multikey_2(recipe: Recipe, count_tokens: CountTokens) -> Sample:
    """One needle, word to number, in a haystack of needles with other keys."""
    return _niah_among_needles(recipe, count_tokens, draw_key, draw_number, "number")


def niah_multikey_3(recipe: Recipe, count_tokens: CountTokens) -> Sample:
    """One needle, UUID to UUID, in a haystack of needles with other keys."""
    return _niah_among_needles(recipe, count_tokens, _draw_uuid, _draw_uuid, "uuid")


def vt(recipe: Recipe, count_tokens: CountTokens) -> Sample:
    """Variable tracking: a chain of four assignments among repeated sentences; one example first."""
    hops, example_noise = 4, 10
    random = _random(recipe)
    example = "".join(_vt_text(random, hops, example_noise)) + "\n\n"

    def make(units: int) -> Sample:
        context, question, answer = _vt_text(Random(random_seed), hops, units)
        return Sample.of(
            recipe,
            example + context,
            question,
            tuple(answer.split()),
            answer,
            _VT_NEW_TOKENS,
        )

    random_seed = random.getrandbits(64)
    return fit(make, recipe.length, count_tokens)


def cwe(recipe: Recipe, count_tokens: CountTokens) -> Sample:
    """Common words: the ten words that a numbered list repeats most; one example first."""
    frequent, rare = (30, 3) if recipe.length >= 4096 else (6, 1)
    random = _random(recipe)
    vocabulary = random.sample(all_words(), len(all_words()))
    example = "".join(_cwe_text(random, vocabulary[-20:], 3, 1)) + "\n"

    def make(units: int) -> Sample:
        chosen = vocabulary[: 10 + units]
        context, question, answer = _cwe_text(Random(recipe.seed), chosen, frequent, rare)
        return Sample.of(
            recipe,
            example + context,
            question,
            tuple(chosen[:10]),
            answer,
            _CWE_NEW_TOKENS,
        )

    return fit(make, recipe.length, count_tokens)


def fwe(recipe: Recipe, count_tokens: CountTokens) -> Sample:
    """Frequent words: the three commonest made-up words of a text with zeta-distributed counts."""
    alpha = 2
    zeta = pi**2 / 6
    random = _random(recipe)
    coded = ["".join(random.choices(string.ascii_lowercase, k=6)) for _ in range(recipe.length // 50)]
    coded[0] = "...."

    def make(units: int) -> Sample:
        counts = [round(units * (rank**-alpha) / zeta) for rank in range(1, len(coded) + 1)]
        text = [word for word, count in zip(coded, counts, strict=True) for _ in range(count)]
        Random(recipe.seed).shuffle(text)
        answers = tuple(coded[1:4])
        return Sample.of(
            recipe,
            "Read the following coded text and track the frequency of each coded word. Find the three most "
            f"frequently appeared coded words. {' '.join(text)}",
            "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three "
            "most frequently appeared words in the above coded text? Answer: According to the coded text "
            "above, the three most frequently appeared words are:",
            answers,
            " " + ", ".join(answers),
            _FWE_NEW_TOKENS,
        )

    return fit(make, recipe.length, count_tokens)


def niah_texts(kind: str, key: str, value: str) -> tuple[str, str, str]:
    """Gives what stands before the haystack, the question after it, and the needle.

    Args:
        kind: Of the value: "number" or "uuid".
        key: What is asked for.
        value: The answer.
    """
    return (
        f"A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz "
        f"you about the {kind} afterwards.\n",
        f"\nWhat is the special magic {kind} for {key} mentioned in the provided text? The special magic "
        f"{kind} for {key} mentioned in the provided text is",
        f"One of the special magic {kind}s for {key} is: {value}.",
    )


def draw_number(random: Random) -> str:
    """Draws a number of seven digits."""
    return str(random.randrange(10**6, 10**7))


def _niah_among_needles(
    recipe: Recipe,
    count_tokens: CountTokens,
    draw: Callable[[Random], str],
    draw_value: Callable[[Random], str],
    kind: str,
) -> Sample:
    def needle(random: Random) -> str:
        return niah_texts(kind, draw(random), draw_value(random))[2]

    return _niah(recipe, count_tokens, draw, draw_value, kind, needle)


def _niah(
    recipe: Recipe,
    count_tokens: CountTokens,
    draw: Callable[[Random], str],
    draw_value: Callable[[Random], str],
    kind: str,
    haystack: Callable[[Random], str],
) -> Sample:
    """A needle among lines that `haystack` draws."""
    random = _random(recipe)
    key, value, depth = draw(random), draw_value(random), random.random()
    intro, question, needle = niah_texts(kind, key, value)
    line_seed = random.getrandbits(64)

    def make(units: int) -> Sample:
        lines = Random(line_seed)
        text = "\n".join(insert([haystack(lines) for _ in range(units)], [needle], [depth]))
        return Sample.of(
            recipe,
            intro + text,
            question,
            (value,),
            f" {value}",
            _NIAH_NEW_TOKENS,
            depth,
        )

    return fit(make, recipe.length, count_tokens)


def _vt_text(random: Random, hops: int, noise: int) -> tuple[str, str, str]:
    """Context, question and answer of a chain of variables."""
    names: list[str] = []
    while len(names) <= hops:
        name = "".join(random.choices(string.ascii_uppercase, k=5))
        names += [name] if name not in names else []
    value = str(random.randrange(10**4, 10**5))
    sources = [value, *(f"VAR {name}" for name in names[:-1])]
    chain = [f"VAR {name} = {source}" for name, source in zip(names, sources, strict=True)]
    depths = sorted(random.random() for _ in chain)
    lines = insert([NOISE] * noise, chain, depths)
    return (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        + "\n".join(lines),
        f"\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: "
        f"According to the chain(s) of variable assignment in the text above, {len(names)} variables are "
        f"assigned the value {value}, they are:",
        " " + " ".join(names),
    )


def _cwe_text(random: Random, chosen: list[str], frequent: int, rare: int) -> tuple[str, str, str]:
    """Context, question and answer of a list in which the first ten of the `chosen` words are frequent."""
    listed = chosen[:10] * frequent + chosen[10:] * rare
    random.shuffle(listed)
    numbered = " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))
    return (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the "
        f"ones that appear most often.\n{numbered}",
        "\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 words that "
        "appear most often in the list are:",
        " " + " ".join(f"{i}. {word}" for i, word in enumerate(chosen[:10], 1)),
    )


def _draw_uuid(random: Random) -> str:
    return str(UUID(int=random.getrandbits(128), version=4))


def _random(recipe: Recipe) -> Random:
    return Random(f"{recipe.task} {recipe.length} {recipe.seed}")
