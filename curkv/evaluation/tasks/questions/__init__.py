"""Five questions of different families about one text: codes, towns, days, prices, passwords and more.

Families, wordings and kinds of text vary so that no policy can be fitted to one template. The conversation
is written out by the model's chat template, or as text if it has none, and the model's own right answer with
the full cache is the target: only what the full cache answers counts.

Settings of policies are chosen on seeds below 10,000; reports are made from those above
(`benchmarks/questions.sh`).
"""

from __future__ import annotations

from random import Random

from curkv.evaluation.tasks.base import Asked, CountTokens, Recipe, Sample, fit
from curkv.evaluation.tasks.questions.facts import Fact, draw_facts
from curkv.evaluation.tasks.questions.texts import TEXTS, hide

QUESTIONS = 5
"""Facts in a text, each of another family."""

_FORMS = ("{q}", "Question: {q}", "{q} Answer from the text above.", "Answer in one sentence: {q}")
_NEW_TOKENS = 32


def questions(recipe: Recipe, count_tokens: CountTokens) -> Sample:
    """A text of the kind that the recipe names as its corpus, and five questions about it.

    Raises:
        ValueError: There is no such kind of text.
    """
    if recipe.corpus not in TEXTS:
        raise ValueError(f"no text {recipe.corpus!r} to ask about; there are {', '.join(TEXTS)}")
    name = f"{recipe.task} {recipe.corpus} {recipe.length} {recipe.seed}"
    random = Random(name)
    facts = draw_facts(random, QUESTIONS)
    depths = [random.random() for _ in facts]
    form = random.choice(_FORMS)
    asked = tuple(_asked(fact, depth, form) for fact, depth in zip(facts, depths, strict=True))

    def make(units: int) -> Sample:
        text = hide(TEXTS[recipe.corpus], name, units, facts, depths)
        return Sample(recipe, f"{text}\n\n", asked, chat=True)

    return fit(make, recipe.length, count_tokens)


def _asked(fact: Fact, depth: float, form: str) -> Asked:
    return Asked(
        question=form.format(q=fact.question),
        answers=(fact.value,),
        target=None,
        max_new_tokens=_NEW_TOKENS,
        depth=depth,
        name=fact.family,
        also=fact.also,
    )
