"""What a sample is, how its answer is judged, and how it is made to a length."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Protocol

from curkv.evaluation.corpora import load_corpus

CountTokens = Callable[[str], int]


@dataclass(frozen=True)
class Recipe:
    """What a sample is made from.

    Attributes:
        task: Name of the task.
        length: Most tokens of context and question together.
        seed: Of everything random in the sample.
        corpus: Text for tasks over real text, see `load_corpus`, or the kind of text of "questions".
    """

    task: str
    length: int
    seed: int
    corpus: str

    @property
    def key(self) -> tuple[str, str, int, int]:
        """What tells it from others, as records have it."""
        return self.task, self.corpus, self.length, self.seed


@dataclass(frozen=True)
class Asked:
    """A question about a context.

    Attributes:
        question: What follows the context; outside chats it ends where the answer begins.
        answers: Strings that the answer has to contain, all of them.
        target: The right answer word by word, for its likelihood; None: what the full cache answers, if it is
            right, and else the question does not count.
        max_new_tokens: Most tokens of an answer.
        depth: Where in the context the answer lies, 0 to 1, where that is a single place.
        name: Tells the questions of a sample apart.
        also: Strings, each of which says all that `answers` do.
    """

    question: str
    answers: tuple[str, ...]
    target: str | None
    max_new_tokens: int
    depth: float | None = None
    name: str = ""
    also: tuple[str, ...] = ()

    def score(self, text: str) -> float:
        """Share of what an answer has to contain that a text contains."""
        wordings = self.answers, *((words,) for words in self.also)
        return max(string_match_all(text, words) for words in wordings)


@dataclass(frozen=True)
class Sample:
    """Questions to a model, each alone, apart from the context that they are about.

    Attributes:
        recipe: What it was made from; the same recipe makes the same sample.
        context: What a policy sees before the question under the protocol "hidden".
        asked: The questions, one at least.
        chat: Context and question are a user's message, to be written out by the model's chat template; a
            model that has none goes on behind "Answer:".
    """

    recipe: Recipe
    context: str
    asked: tuple[Asked, ...]
    chat: bool = False

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        context: str,
        question: str,
        answers: tuple[str, ...],
        target: str,
        max_new_tokens: int,
        depth: float | None = None,
    ) -> Sample:
        """A sample with one question."""
        return cls(recipe, context, (Asked(question, answers, target, max_new_tokens, depth),))


class MakeSample(Protocol):
    """Makes the sample of a recipe; `count_tokens` counts a string's tokens for the model at hand."""

    def __call__(self, recipe: Recipe, count_tokens: CountTokens) -> Sample: ...  # noqa: D102


def string_match_all(answer: str, references: Sequence[str]) -> float:
    """Share of the references that an answer contains, whatever case and line breaks (RULER's metric)."""
    found = _plain(answer)
    return sum(_plain(reference) in found for reference in references) / len(references)


def fit(make: Callable[[int], Sample], length: int, count_tokens: CountTokens) -> Sample:
    """Makes the longest sample that fits.

    Args:
        make: From a number of units (sentences, words) to a sample; more units make it longer.
        length: Most tokens of context and question.
        count_tokens: Of the model.

    Raises:
        ValueError: Not even one unit fits, or there is too little text.
    """

    def fits(units: int) -> bool:
        sample = make(units)
        question = max(count_tokens(asked.question) for asked in sample.asked)
        return count_tokens(sample.context) + question <= length

    if not fits(1):
        raise ValueError(f"{make(1).recipe.task} does not fit into {length} tokens")
    good, bad = 1, 2
    while fits(bad):
        good, bad = bad, 2 * bad
        if good > length:
            raise ValueError(f"{make(1).recipe.task} has too little text for {length} tokens")
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return make(good)


@cache
def sentences(corpus: str) -> list[str]:
    """Splits a corpus into sentences and headings, each with the white space behind it."""
    return re.findall(r".+?(?:[.!?:]\s+|\n\s*\n|\Z)", load_corpus(corpus), re.DOTALL)


def insert(texts: Sequence[str], inserted: Sequence[str], depths: Sequence[float]) -> list[str]:
    """Puts strings between others, each at its depth from 0 (first) to 1 (last) in the length of the text."""
    result, starts = list(texts), list(accumulate(map(len, texts), initial=0))
    for text, depth in sorted(zip(inserted, depths, strict=True), key=lambda pair: -pair[1]):
        result.insert(bisect_left(starts, depth * starts[-1]), text)
    return result


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
