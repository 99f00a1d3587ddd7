"""Facts that can be asked for: ten families, each in several wordings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from curkv.evaluation.tasks.words import words

PEOPLE = [
    *("Aoife", "Bruno", "Clara", "Dmitri", "Elena", "Farid", "Greta", "Hugo", "Ingrid", "Jonas", "Karin"),
    *("Leona", "Marta", "Nadia", "Oskar", "Paulo", "Quentin", "Rashid", "Selma", "Tobias", "Ursula"),
    *("Viktor", "Wanda", "Xenia", "Yusuf", "Zora"),
]
PLACES = [
    *("bakery", "boathouse", "city museum", "town hall", "old library", "harbour office", "post office"),
    *("railway station", "north school", "observatory", "water mill", "power plant", "theatre", "zoo"),
    *("botanical garden", "fire station", "art gallery", "sports hall", "lighthouse", "airport"),
]
_SURNAMES = [
    *("Albescu", "Brandt", "Costa", "Dufour", "Eriksen", "Farkas", "Gruber", "Horvat", "Ivanova", "Jansen"),
    *("Kowalski", "Lindgren", "Moreau", "Novak", "Okafor", "Petrov", "Quist", "Rossi", "Silva", "Tanaka"),
]
_TOWNS = [
    *("Aarhus", "Bergen", "Cardiff", "Dresden", "Esbjerg", "Florence", "Ghent", "Haarlem", "Innsbruck"),
    *("Lisbon", "Malaga", "Nantes", "Oslo", "Porto", "Quebec", "Riga", "Seville", "Turin", "Utrecht"),
]
_JOBS = [
    *("baker", "carpenter", "dentist", "electrician", "farmer", "gardener", "journalist", "librarian"),
    *("mechanic", "nurse", "painter", "plumber", "sailor", "tailor", "teacher", "translator", "welder"),
]
_COLOURS = ["black", "blue", "brown", "green", "orange", "pink", "purple", "red", "silver", "white", "yellow"]
_DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
_MONTHS = [
    *("January", "February", "March", "April", "May", "June", "July", "August", "September", "October"),
    *("November", "December"),
]
_LOCKED = ["alarm", "safe", "side gate", "vault", "garage", "locker room"]
_OWNED = ["bicycle", "boat", "coat", "front door", "suitcase", "umbrella", "van"]
_EVENTS = ["concert", "flea market", "inspection", "lecture", "rehearsal", "yearly meeting"]


@dataclass(frozen=True)
class Fact:
    """Something that a context says once.

    Attributes:
        family: What kind of thing is asked for.
        subject: What it is said of, as a record names it.
        attribute: What is said of it, as a record's field.
        value: The answer.
        statement: A sentence that says it.
        question: One that asks for it.
        also: Other ways to write the answer.
    """

    family: str
    subject: str
    attribute: str
    value: str
    statement: str
    question: str
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """How facts of a family are drawn.

    Attributes:
        subject: Draws whom or what it is said of.
        value: Draws the answer.
        attribute: What the answer is of the subject.
        wordings: Pairs of a statement and a question, with `{s}` and `{v}`.
        also: Writes an answer in other ways that are as right.
    """

    subject: Callable[[Random], str]
    value: Callable[[Random], str]
    attribute: str
    wordings: tuple[tuple[str, str], ...]
    also: Callable[[str], tuple[str, ...]] = lambda value: ()


def _at_place(things: list[str]) -> Callable[[Random], str]:
    return lambda random: f"{random.choice(things)} of the {random.choice(PLACES)}"


def _person(random: Random) -> str:
    return random.choice(PEOPLE)


def _password(random: Random) -> str:
    return "-".join(random.sample(words("noun"), 2)).replace(" ", "")


def _month_first(date: str) -> tuple[str, ...]:
    day, month, year = date.split()
    return (f"{month} {day}, {year}",)


FAMILIES = {
    "code": Family(
        _at_place(_LOCKED),
        lambda random: str(random.randrange(1000, 10000)),
        "code",
        (
            ("The code of the {s} is {v}.", "What is the code of the {s}?"),
            ("To open the {s}, enter {v}.", "What has to be entered to open the {s}?"),
            ("The {s} got the new code {v}.", "Which code did the {s} get?"),
        ),
    ),
    "phone": Family(
        lambda random: random.choice(PLACES),
        lambda random: f"555-{random.randrange(10000):04}",
        "phone number",
        (
            ("The phone number of the {s} is {v}.", "What is the phone number of the {s}?"),
            ("You can call the {s} at {v}.", "Which number reaches the {s}?"),
        ),
    ),
    "town": Family(
        _person,
        lambda random: random.choice(_TOWNS),
        "home town",
        (
            ("{s} lives in {v}.", "In which town does {s} live?"),
            ("The home town of {s} is {v}.", "What is the home town of {s}?"),
        ),
    ),
    "job": Family(
        _person,
        lambda random: random.choice(_JOBS),
        "job",
        (
            ("{s} works as a {v}.", "What is the job of {s}?"),
            ("The job of {s} is {v}.", "What does {s} work as?"),
        ),
    ),
    "day": Family(
        _at_place(_EVENTS),
        lambda random: random.choice(_DAYS),
        "day",
        (
            ("The {s} is on {v}.", "On which day is the {s}?"),
            ("The {s} was moved to {v}.", "To which day was the {s} moved?"),
        ),
    ),
    "colour": Family(
        lambda random: f"{random.choice(_OWNED)} of {_person(random)}",
        lambda random: random.choice(_COLOURS),
        "colour",
        (
            ("The {s} is {v}.", "What colour is the {s}?"),
            ("The colour of the {s} is {v}.", "What is the colour of the {s}?"),
        ),
    ),
    "price": Family(
        _at_place(_EVENTS),
        lambda random: f"{random.randrange(5, 95)}.{random.randrange(5, 100, 5):02}",
        "price",
        (
            ("A ticket for the {s} costs {v} euros.", "How much does a ticket for the {s} cost?"),
            ("The price of the {s} is {v} euros.", "What is the price of the {s}?"),
        ),
    ),
    "name": Family(
        lambda random: f"director of the {random.choice(PLACES)}",
        lambda random: f"{random.choice(PEOPLE)} {random.choice(_SURNAMES)}",
        "name",
        (
            ("The name of the {s} is {v}.", "What is the name of the {s}?"),
            ("{v} is the new {s}.", "Who is the new {s}?"),
        ),
    ),
    "password": Family(
        lambda random: f"computer in the {random.choice(PLACES)}",
        _password,
        "password",
        (
            ("The password of the {s} is {v}.", "What is the password of the {s}?"),
            ("Log in to the {s} with the password {v}.", "Which password logs in to the {s}?"),
        ),
    ),
    "date": Family(
        lambda random: random.choice(PLACES),
        lambda random: f"{random.randrange(1, 29)} {random.choice(_MONTHS)} {random.randrange(1850, 2020)}",
        "opening date",
        (
            ("The {s} was opened on {v}.", "When was the {s} opened?"),
            ("The opening date of the {s} is {v}.", "What is the opening date of the {s}?"),
        ),
        _month_first,
    ),
}


def draw_facts(random: Random, count: int) -> list[Fact]:
    """Draws facts of as many different families, about different people and places."""
    facts: list[Fact] = []
    for family in random.sample(list(FAMILIES), count):
        facts.append(_draw(random, family, [fact.subject for fact in facts]))
    return facts


def _draw(random: Random, name: str, taken: list[str]) -> Fact:
    family = FAMILIES[name]
    subject = family.subject(random)
    while any(subject in other or other in subject for other in taken):
        subject = family.subject(random)
    value, (statement, question) = family.value(random), random.choice(family.wordings)
    return Fact(
        family=name,
        subject=subject,
        attribute=family.attribute,
        value=value,
        statement=_sentence(statement.format(s=subject, v=value)),
        question=_sentence(question.format(s=subject)),
        also=family.also(value),
    )


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]
