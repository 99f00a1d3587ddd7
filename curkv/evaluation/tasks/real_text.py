"""Tasks over varied real text, whose answers can be checked."""

from __future__ import annotations

import re
from random import Random

from curkv.evaluation.tasks.base import CountTokens, Recipe, Sample, fit, insert, sentences
from curkv.evaluation.tasks.ruler import draw_number, niah_texts
from curkv.evaluation.tasks.words import draw_key, words

DEPTHS = 10
"""Rows of the needle grid: seed i hides its needle in the middle of tenth i mod 10 of the context."""

CONTINUATION_TOKENS = 128
"""Tokens of held-out text over which a continuation is measured."""

_NAMES = [
    *("Alice", "Bruno", "Clara", "Dmitri", "Elena", "Farid", "Greta", "Hugo"),
    *("Ingrid", "Jonas", "Karin", "Luca", "Maria", "Nadia", "Oscar", "Petra"),
]
_CITIES = [
    "Athens",
    "Berlin",
    "Cairo",
    "Dublin",
    "Geneva",
    "Havana",
    "Lisbon",
    "Madrid",
    "Oslo",
    "Paris",
    "Rome",
]
_TOLD, _WANTED = 6, 8  # words of a quoted sentence that the question tells and the answer has to add
_NEEDLE_NEW_TOKENS, _QUESTION_NEW_TOKENS, _QUOTE_NEW_TOKENS = 24, 24, 40


def needle(recipe: Recipe, count_tokens: CountTokens) -> Sample:
    """RULER's needle, word to number, at a given depth of real text: the needle grid."""
    random, text = _start(recipe)
    key, value, depth = draw_key(random), draw_number(random), (recipe.seed % DEPTHS + 0.5) / DEPTHS
    intro, question, hidden = niah_texts("number", key, value)

    def make(units: int) -> Sample:
        context = "".join(insert(text[:units], [f"{hidden} "], [depth]))
        return Sample.of(recipe, intro + context, question, (value,), f" {value}", _NEEDLE_NEW_TOKENS, depth)

    return fit(make, recipe.length, count_tokens)


def qa_fact(recipe: Recipe, count_tokens: CountTokens) -> Sample:
    """Four facts of the same kind spread over real text; one is asked for."""
    random, text = _start(recipe)
    people, cities = random.sample(_NAMES, 4), random.sample(_CITIES, 4)
    things = random.sample(words("noun"), 4)
    facts = [
        f"{person} keeps the old {thing} in a house in {city}. "
        for person, thing, city in zip(people, things, cities, strict=True)
    ]
    depths = [random.random() for _ in facts]
    asked = f"In which city does {people[0]} keep the old {things[0]}?"
    question = f"\n\nQuestion: {asked}\nAnswer: {people[0]} keeps it in"

    def make(units: int) -> Sample:
        context = "".join(insert(text[:units], facts, depths))
        return Sample.of(
            recipe, context, question, (cities[0],), f" {cities[0]}", _QUESTION_NEW_TOKENS, depths[0]
        )

    return fit(make, recipe.length, count_tokens)


def qa_list(recipe: Recipe, count_tokens: CountTokens) -> Sample:
    """Three facts spread over real text that have to be put together."""
    random, text = _start(recipe)
    people = random.sample(_NAMES, 3)
    facts = [f"{person} has signed the visitors' book. " for person in people]
    depths = sorted(random.random() for _ in facts)
    question = (
        "\n\nQuestion: Which three people have signed the visitors' book?\nAnswer: The three people who have "
        "signed the visitors' book are"
    )
    target = f" {people[0]}, {people[1]}, and {people[2]}."

    def make(units: int) -> Sample:
        context = "".join(insert(text[:units], facts, depths))
        return Sample.of(recipe, context, question, tuple(people), target, _QUESTION_NEW_TOKENS)

    return fit(make, recipe.length, count_tokens)


def qa_quote(recipe: Recipe, count_tokens: CountTokens) -> Sample:
    """A sentence of the real text itself, to be finished from its first words; nothing is inserted."""
    random, text = _start(recipe)
    asked = random.random()

    def make(units: int) -> Sample:
        context = "".join(text[:units])
        depth, quote = _quotable(text[:units], asked)
        told, wanted = " ".join(quote[:_TOLD]), " ".join(quote[_TOLD:])
        question = f'\n\nQuestion: How does the sentence go on that begins with "{told}"?\nAnswer: "{told}'
        return Sample.of(recipe, context, question, (wanted,), f" {wanted}", _QUOTE_NEW_TOKENS, depth)

    return fit(make, recipe.length, count_tokens)


def continuation(recipe: Recipe, count_tokens: CountTokens) -> Sample:
    """Real text and the 128 tokens that follow it; there is no question."""
    _, text = _start(recipe)
    spaced_words = re.findall(r"\s*\S+", "".join(text))

    def make(units: int) -> Sample:
        following = "".join(spaced_words[units : units + CONTINUATION_TOKENS])
        return Sample.of(recipe, "".join(spaced_words[:units]), "", (), following, CONTINUATION_TOKENS)

    return fit(make, recipe.length, count_tokens)


def _start(recipe: Recipe) -> tuple[Random, list[str]]:
    """The sample's random numbers, and the sentences of the corpus from a random one on."""
    random = Random(f"{recipe.task} {recipe.length} {recipe.seed}")
    text = sentences(recipe.corpus)
    start = random.randrange(len(text))
    return random, text[start:] + text[:start]


def _quotable(text: list[str], asked: float) -> tuple[float, list[str]]:
    """The long enough sentence with a unique beginning nearest to a depth: its depth and words."""
    plain = " ".join(" ".join(text).split())

    def unfit(index: int) -> tuple[bool, float]:
        quote = text[index].split()
        told = " ".join(quote[:_TOLD])
        good = (
            len(quote) >= _TOLD + _WANTED and told[0].isalpha() and '"' not in told and plain.count(told) == 1
        )
        return not good, abs(index / len(text) - asked)

    best = min((index for index, sentence in enumerate(text) if sentence.split()), key=unfit)
    return best / len(text), text[best].split()[: _TOLD + _WANTED]
