"""Kinds of text that facts are hidden in: what they consist of, and how a fact is said in each."""

from __future__ import annotations

import inspect
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from random import Random

from curkv.evaluation.tasks.base import insert, sentences
from curkv.evaluation.tasks.questions.facts import PEOPLE, Fact
from curkv.evaluation.tasks.words import words

_MODULES = (
    *("argparse", "calendar", "configparser", "csv", "difflib", "email.message", "fractions", "ftplib"),
    *("gettext", "heapq", "http.client", "imaplib", "ipaddress", "json.decoder", "logging", "mailbox"),
    *("optparse", "pathlib", "pickle", "plistlib", "queue", "sched", "shlex", "smtplib", "statistics"),
    *("string", "tarfile", "textwrap", "threading", "uuid", "zipfile"),
)
"""Of Python's library, whose source is the text of kind "code"."""


_LONG = 400
"""Characters of what is no sentence any more."""


class Text(ABC):
    """A kind of text, drawn in units that facts can stand between."""

    @abstractmethod
    def units(self, random: Random, count: int) -> list[str]:
        """Draws units; fewer of another call with the same random numbers are the first ones of these."""

    @abstractmethod
    def say(self, random: Random, fact: Fact) -> str:
        """Words a fact as a unit."""

    def join(self, units: Sequence[str], said: Sequence[str]) -> str:
        """Puts units together, among them the `said` ones."""
        return "".join(units)


class Prose(Text):
    """Sentences of a corpus from a random place on."""

    def __init__(self, corpus: str) -> None:
        self._corpus = corpus

    def units(self, random: Random, count: int) -> list[str]:
        """See `Text.units`."""
        text = _short_units(self._corpus)
        start = random.randrange(len(text))
        return (text[start:] + text[:start])[:count]

    def say(self, random: Random, fact: Fact) -> str:
        """See `Text.say`."""
        return f"{fact.statement} "


@cache
def _short_units(corpus: str) -> list[str]:
    """Sentences; those that are listings or tables rather, line by line."""
    units = []
    for sentence in sentences(corpus):
        units += [sentence] if len(sentence) < _LONG else sentence.splitlines(keepends=True)
    return units


class Log(Text):
    """Lines that repeat themselves but for names, numbers and times, in one of three formats."""

    _MESSAGES = (
        *("disk {n} reached {m} percent", "backup of volume {n} finished without errors"),
        *("certificate of host {h} was renewed", "service {h} restarted after a timeout"),
        *("job {n} was skipped because nothing had changed", "user {h} signed in from the office"),
        *("connection to {h} was closed by the peer", "queue {n} is empty again"),
        *("GET /api/v1/items/{m} 200 {n}ms", "cache miss for key item:{m}, fetched from replica {n}"),
        *("worker {n} picked up task {m}", "rotated log file after {m} MB"),
    )

    def units(self, random: Random, count: int) -> list[str]:
        """See `Text.units`."""
        form, messages = random.randrange(3), random.sample(self._MESSAGES, 7)
        lines, seconds = [], 0
        for _ in range(count):
            seconds += random.randrange(20, 600)
            host, number = random.choice(PEOPLE).lower(), random.randrange(1, 10)
            message = random.choice(messages).format(h=host, n=number, m=random.randrange(10, 100))
            lines.append(_stamped(form, seconds, "INFO", message))
        return lines

    def say(self, random: Random, fact: Fact) -> str:
        """See `Text.say`."""
        return fact.statement

    def join(self, units: Sequence[str], said: Sequence[str]) -> str:
        """Gives the said lines the form and the time of those before them."""
        lines: list[str] = []
        before = next(unit for unit in units if unit not in said)
        for unit in units:
            lines.append(_restamped(before, unit) if unit in said else unit)
            before = lines[-1]
        return "\n".join(lines)


def _stamped(form: int, seconds: int, level: str, message: str) -> str:
    minutes, second = divmod(seconds, 60)
    hour, minute = divmod(minutes, 60)
    if form == 0:
        return f"{hour:02}:{minute:02} {level} {message}"
    if form == 1:
        time = f"Nov {3 + hour // 24:02} {hour % 24:02}:{minute:02}:{second:02}"
        return f"{time} web-2 app[812]: {level}: {message}"
    return f'ts={seconds} level={level} msg="{message}"'


def _restamped(line: str, message: str) -> str:
    """A line with another message of level NOTE."""
    if line.startswith("ts="):
        return f'{line.partition(" ")[0]} level=NOTE msg="{message}"'
    stamp, level = re.split(r"(INFO:?|NOTE:?)", line, maxsplit=1)[:2]
    return f"{stamp}{level.replace('INFO', 'NOTE')} {message}"


class Records(Text):
    """Orders as CSV or as lines of JSON; a fact is the remark about one of them, or a record of its own."""

    _REMARKS = (
        "paid in cash",
        "delivered to the office",
        "",
        "",
        "to be packed twice",
        "gift",
        "returned once",
    )

    def units(self, random: Random, count: int) -> list[str]:
        """See `Text.units`."""
        form, number, lines = random.randrange(2), random.randrange(1000, 9000), []
        for _ in range(count):
            number += random.randrange(1, 9)
            item = f"{random.choice(words('adjective'))} {random.choice(words('noun'))}"
            lines.append(_record(form, number, item, random.randrange(1, 40), random.choice(self._REMARKS)))
        return lines

    def say(self, random: Random, fact: Fact) -> str:
        """See `Text.say`."""
        if random.random() < 0.5:
            return json.dumps([fact.subject, f"{fact.attribute}: {fact.value}"])
        return json.dumps(
            [f"{random.choice(words('adjective'))} {random.choice(words('noun'))}", fact.statement]
        )

    def join(self, units: Sequence[str], said: Sequence[str]) -> str:
        """Gives the said records the form of the others."""
        form = int(next(unit for unit in units if unit not in said).startswith("{"))
        lines, number = [], 0
        for unit in units:
            if unit in said:
                item, remark = json.loads(unit)
                lines.append(_record(form, number + 1, item, 1, remark))
            else:
                number = int(re.findall(r"\d+", unit)[0])
                lines.append(unit)
        return "\n".join(lines if form else ["order,item,quantity,remark", *lines])


def _record(form: int, number: int, item: str, quantity: int, remark: str) -> str:
    if form == 0:
        return f'{number},{item},{quantity},"{remark}"'
    return json.dumps({"order": number, "item": item, "quantity": quantity, "remark": remark})


class Code(Text):
    """Source of Python's library; a fact is a comment or a constant."""

    def units(self, random: Random, count: int) -> list[str]:
        """See `Text.units`."""
        blocks = _blocks(random.choice(_MODULES)) + _blocks(random.choice(_MODULES))
        start = random.randrange(len(blocks))
        return (blocks[start:] + blocks[:start])[:count]

    def say(self, random: Random, fact: Fact) -> str:
        """See `Text.say`."""
        if random.random() < 0.5:
            return f"# {fact.statement}"
        name = re.sub(r"\W+", "_", f"{fact.attribute} of {fact.subject}").upper()
        return f'{name} = "{fact.value}"'

    def join(self, units: Sequence[str], said: Sequence[str]) -> str:
        """Indents the said lines as the code behind them is."""
        blocks, indentation = [], ""
        for unit in reversed(units):
            if unit not in said:
                indentation = unit[: len(unit) - len(unit.lstrip())]
            blocks.append(indentation + unit if unit in said else unit)
        return "\n\n".join(reversed(blocks))


@cache
def _blocks(module: str) -> list[str]:
    """A module's source, split where lines are empty."""
    source = inspect.getsource(import_module(module))
    return [block for block in re.split(r"\n\s*\n", source) if block.strip()]


class Chat(Text):
    """Small talk of four people."""

    _SAID = (
        "Did anybody see the {a} {n} yesterday?",
        "I do not think so.",
        "Sorry, I was in a meeting.",
        "We should talk about the {n} next week.",
        "That sounds {a} to me.",
        "Who is bringing the {n}?",
        "No idea, ask {p}.",
        "I can send you the {n} later today.",
        "Thanks!",
        "Good morning everybody.",
        "My {n} is broken again.",
        "The {a} one or the other one?",
        "Haha, that is so {a}.",
        "See you then.",
        "{p} told me that the {n} was {a}.",
        "Has the {n} arrived already?",
        "Not yet, maybe tomorrow.",
        "I had a {a} {n} for lunch.",
        "Can we move it by an hour?",
        "Fine with me.",
        "Let us ask {p} first.",
        "The {n} in the kitchen smells {a}.",
        "I will look at it after lunch.",
        "Please do not forget the {n}.",
    )

    def units(self, random: Random, count: int) -> list[str]:
        """See `Text.units`."""
        people, lines = random.sample(PEOPLE, 4), []
        for _ in range(count):
            noun, adjective = random.choice(words("noun")), random.choice(words("adjective"))
            said = random.choice(self._SAID).format(n=noun, a=adjective, p=random.choice(people))
            lines.append(f"{random.choice(people)}: {said}")
        return lines

    def say(self, random: Random, fact: Fact) -> str:
        """See `Text.say`."""
        opening = random.choice(("By the way: ", "", "Just so you know: ", "Remember: "))
        return f"{random.choice(('Me', 'Boss', 'Guest'))}: {opening}{fact.statement}"

    def join(self, units: Sequence[str], said: Sequence[str]) -> str:
        """One line each."""
        return "\n".join(units)


TEXTS: dict[str, Text] = {
    "novel": Prose("austen"),
    "documentation": Prose("documentation"),
    "licences": Prose("licences"),
    "log": Log(),
    "records": Records(),
    "code": Code(),
    "chat": Chat(),
}
"""Every kind by name; "novel" needs a corpus that is installed apart, see `load_corpus`."""


def hide(text: Text, random_seed: str, units: int, facts: Sequence[Fact], depths: Sequence[float]) -> str:
    """Writes a text of so many units with facts at given depths."""
    random = Random(random_seed)
    said = [text.say(random, fact) for fact in facts]
    return text.join(insert(text.units(random, units), said, depths), said)
