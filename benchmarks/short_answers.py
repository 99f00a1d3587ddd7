"""Short questions in chat form, by the type of the weights: how many are answered, and what becomes of each.

    python benchmarks/short_answers.py [--weights int8 --weights published ...]

125 questions with a known answer (capitals, sums, opposites, colours, months), one turn each, greedily. The
share that other weights answer of what float32 weights answer, and of what these miss: both change when
rounding tips a close choice either way, and the number that is right tells whether it costs anything (exact
McNemar test of the pairs). `kept-NAME` rounds weights alone, as NAME does: products, and what goes into them,
are those of float32.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Annotated

import typer
from torch import Tensor

from curkv.bench.script import Model, script, submit
from curkv.cache.options import EvictionOptions
from curkv.config import EngineOptions
from curkv.engine.build import build_engine
from curkv.engine.types import SamplingParams
from curkv.evaluation.statistics import mcnemar
from curkv.kernels.linear.formats import WEIGHT_CHOICES
from curkv.kernels.linear.spec import Linear
from curkv.models.blocks import Packer
from curkv.models.loading.built_in import DEFAULT_MODEL
from curkv.tables import head, line

CAPITALS = """
France Paris, Germany Berlin, Italy Rome, Spain Madrid, Portugal Lisbon, Japan Tokyo, China Beijing, India
Delhi, Russia Moscow, Egypt Cairo, Greece Athens, Ireland Dublin, Norway Oslo, Sweden Stockholm, Finland
Helsinki, Denmark Copenhagen, Poland Warsaw, Austria Vienna, Hungary Budapest, Belgium Brussels, Cuba
Havana, Peru Lima, Chile Santiago, Canada Ottawa, Australia Canberra, Turkey Ankara, Kenya Nairobi, Thailand
Bangkok, Vietnam Hanoi, Iraq Baghdad, Iran Tehran, England London, Scotland Edinburgh, Switzerland Bern,
Romania Bucharest, Mexico Mexico, Argentina Buenos, Colombia Bogot, Philippines Manila, Ukraine Kyiv
"""
OPPOSITES = """
hot cold, big small, fast slow, light dark, up down, left right, open close, early late, happy sad, rich
poor, hard soft, old young, day night, full empty, wet dry, strong weak, loud quiet, high low, love hate,
black white
"""
COLOURS = """
the sky blue, grass green, blood red, snow white, coal black, a lemon yellow, an orange orange, a banana
yellow
"""
NEXT = """
Monday Tuesday, Wednesday Thursday, Friday Saturday, Saturday Sunday, January February, March April, June
July, August September, October November, November December
"""
ANIMALS = """
dog puppy, cat kitten, cow calf, sheep lamb, horse foal, duck duckling, lion cub, frog tadpole
"""
PLAIN = """How many days are in a week?|seven 7
How many months are in a year?|twelve 12
How many hours are in a day?|24 twenty-four
How many minutes are in an hour?|60 sixty
How many seconds are in a minute?|60 sixty
How many letters are in the English alphabet?|26 twenty-six
How many sides has a triangle?|three 3
How many sides has a square?|four 4
What is the largest planet in the solar system?|Jupiter
Which planet is closest to the sun?|Mercury
Which planet do we live on?|Earth
What is the chemical symbol for water?|H2O H₂O
What is the chemical symbol for gold?|Au
What gas do plants take in?|carbon
What is frozen water called?|ice
Who wrote Romeo and Juliet?|Shakespeare
Who painted the Mona Lisa?|Leonardo Vinci
Who was the first president of the United States?|Washington
Who discovered penicillin?|Fleming
Who developed the theory of relativity?|Einstein
What is the tallest mountain in the world?|Everest
What is the longest river in Africa?|Nile
What is the largest ocean?|Pacific
On which continent is Brazil?|South
On which continent is Kenya?|Africa
Which language is spoken in Brazil?|Portuguese
Which language is spoken in Mexico?|Spanish
Which organ pumps blood?|heart
What do bees make?|honey
What is the fourth word of this sentence?|word"""
SUMS = "2 3, 4 4, 5 6, 7 8, 9 9, 10 5, 12 12, 20 30, 15 6"


def main(
    model: Model = DEFAULT_MODEL,
    weights: Annotated[
        list[str] | None, typer.Option(help="Repeatable; `kept-NAME`: those, but products of float32.")
    ] = None,
    words: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 32,
) -> None:
    """Asks all of them and prints a table."""
    exact = answered(model, "float32", words)
    print(head(["weights", "right", "of what float32 has right", "of the rest", "p"]))
    print(line(["float32", f"{sum(exact)} of {len(exact)}", "", "", ""]), flush=True)
    for name in weights or ["published", "int8", "int4", "kept-int8", "kept-published"]:
        other = answered(model, name, words)
        both = sum(a and b for a, b in zip(exact, other, strict=True))
        first, second = sum(exact) - both, sum(other) - both
        kept = f"{both} of {sum(exact)}", f"{second} of {len(exact) - sum(exact)}"
        print(line([name, f"{sum(other)}", *kept, f"{mcnemar(first, second):.2f}"]), flush=True)


def questions() -> Iterator[tuple[str, list[str]]]:
    """Each question, and the words of which an answer has one."""

    def pairs(text: str) -> list[tuple[str, str]]:
        return [tuple(pair.strip().rsplit(" ", 1)) for pair in text.replace("\n", " ").split(",")]  # type: ignore[misc]

    yield from ((f"What is the capital of {a}?", [b]) for a, b in pairs(CAPITALS))
    yield from ((f'What is the opposite of "{a}"? Answer with one word.', [b]) for a, b in pairs(OPPOSITES))
    yield from ((f"What color is {a}?", [b]) for a, b in pairs(COLOURS))
    yield from ((f"What comes after {a}?", [b]) for a, b in pairs(NEXT))
    yield from ((f"What is a young {a} called?", [b]) for a, b in pairs(ANIMALS))
    for row in PLAIN.splitlines():
        question, wanted = row.split("|")
        yield question, wanted.split()
    for a, b in pairs(SUMS):
        yield f"What is {a} plus {b}?", [str(int(a) + int(b))]


def answered(model: str, weights: str, words: int) -> list[bool]:
    """Which questions weights of a type answer."""
    rounds = weights.startswith("kept-")
    with rounding(weights.removeprefix("kept-")) if rounds else nullcontext():
        options = EngineOptions(
            model=model,
            weights="float32" if rounds else weights,
            kv_cache_memory=2**29,
            prefix_cache_memory=0,
            kv_dtype="float32",
            max_model_len=512,
        )
        engine = build_engine(options)
    template = engine.info.chat_template
    assert template is not None
    sampling = SamplingParams(max_tokens=words, temperature=0.0)
    for question, _ in questions():
        text = template.render([{"role": "user", "content": question}], {})
        prompt = engine.info.tokenizer.encode(text, add_special_tokens=False).ids
        submit(engine, question, prompt, sampling, EvictionOptions())
    answers: defaultdict[str, str] = defaultdict(str)
    while engine.has_work:
        for output in engine.step():
            answers[output.request_id] += output.text.lower()
    return [any(word.lower() in answers[question] for word in wanted) for question, wanted in questions()]


@contextmanager
def rounding(name: str) -> Iterator[None]:
    """Weights that are packed inside are rounded as those of a type first."""
    pack, form = Packer.linear, next(form for form in WEIGHT_CHOICES if form.name == name)

    def rounded(
        self: Packer, kind: str, weight: Tensor, bias: Tensor | None = None, exact: bool = False
    ) -> Linear:
        stored, scales = Packer(self.kernels, form).form_of(kind, weight, exact).encode(weight)
        return pack(self, kind, stored if scales is None else stored.float() * scales[:, None], bias, exact)

    Packer.linear = rounded  # type: ignore[method-assign]
    try:
        yield
    finally:
        Packer.linear = pack  # type: ignore[method-assign]


app = script(__doc__, main)

if __name__ == "__main__":
    app()
