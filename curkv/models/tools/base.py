"""Tools, the news of a call, and what a family has to say about how it writes calls."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

GUIDANCE = "x-guidance"
"""Key of a JSON schema that says how llguidance is to follow it."""
COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""No white space but a blank behind commas and colons: small models would fill it for ever."""

MOST_CALLS = 16
"""Calls in an answer that has to call: a small model, once made to begin, may go on for ever."""


def compact(schema: Any) -> Any:
    """A schema whose JSON has no white space but behind commas and colons, unless it says otherwise."""
    return {GUIDANCE: COMPACT, **schema} if isinstance(schema, dict) else schema


@dataclass(frozen=True)
class Tool:
    """A function that the model may call.

    Attributes:
        name: its name.
        description: what it does, for the model.
        parameters: JSON schema of its arguments, an object.
        strict: the arguments must follow every keyword of the schema; else keywords that cannot be followed
            while generating are passed over.
    """

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    strict: bool = False

    @property
    def schema(self) -> dict[str, Any]:
        """The schema that generated arguments follow."""
        schema = dict(self.parameters or {"type": "object", "properties": {}, "additionalProperties": False})
        return {**schema, GUIDANCE: COMPACT if self.strict else {**COMPACT, "lenient": True}}


@dataclass(frozen=True)
class Text:
    """Text of the answer itself."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """Text of the model's reasoning."""

    text: str


@dataclass(frozen=True)
class Call:
    """A call begins; the calls of an answer are counted from 0."""

    index: int
    name: str


@dataclass(frozen=True)
class Arguments:
    """The next piece of a call's arguments, which together are a JSON object."""

    index: int
    text: str


Event = Text | Reasoning | Call | Arguments


class Parser(ABC):
    """Reads an answer piece by piece. What turns out not to be a call comes back as text: nothing is lost."""

    @abstractmethod
    def feed(self, text: str) -> list[Event]:
        """Takes the next piece of the answer; returns what it is known to say so far."""

    @abstractmethod
    def finish(self) -> list[Event]:
        """Returns what was held back, at the end of the answer."""


class ToolFormat(ABC):
    """How a family writes calls.

    Attributes:
        name: as `curkv` logs it.
        trigger: text with which calls begin, wherever it stands in an answer.
        markers: texts that mark calls and may be special tokens of the vocabulary.
    """

    name: ClassVar[str]
    trigger: ClassVar[str]
    markers: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def body(self, tools: Sequence[Tool]) -> Grammar:
        """What follows the trigger: one call, to its end."""

    @abstractmethod
    def parser(self, tools: Iterable[str]) -> Parser:
        """Reads answers.

        Args:
            tools: names of the tools there are; what calls another is text.
        """

    between: ClassVar[str] = "\n"
    """Text between two calls."""

    def forced(self, tools: Sequence[Tool], parallel: bool, special: Mapping[str, int]) -> str:
        """A grammar in llguidance's Lark: nothing but calls of these tools.

        Args:
            tools: of which at least one is called.
            parallel: up to `MOST_CALLS` may follow each other; the model may end the answer after each.
            special: id of each marker that is a special token of the vocabulary.
        """
        body = self.body(tools)
        trigger, more = quoted(self.trigger, special), self.more(f"{quoted(self.between)} trigger body")
        start = f"start: trigger body{more * parallel}"
        return "\n".join([start, f"trigger: {trigger}", *body.rules("body", special)])

    @staticmethod
    def more(call: str) -> str:
        """The calls that may follow the first of a forced answer, as part of a rule."""
        return f" ({call}){{0,{MOST_CALLS - 1}}}"

    def allowed(self, tools: Sequence[Tool], parallel: bool, special: Mapping[str, int]) -> str:
        """A grammar: any text, but once a call begins it is one of these tools with arguments that fit.

        The arguments are those of `forced`.
        """
        body = self.body(tools)
        if self.trigger in special:
            head = ["head: TEXT " + quoted(self.trigger, special)]
        else:
            head = [f"head[lazy]: TEXT {quoted(self.trigger)}"]
        start = "start: (head body)* TEXT" if parallel else "start: TEXT | head body"
        return "\n".join([start, *head, r"TEXT: /(.|\n)*/", *body.rules("body", special)])


@dataclass(frozen=True)
class Grammar:
    """A sequence of literal texts and schemas, in alternatives.

    Attributes:
        alternatives: each a sequence; a str is literal, a mapping a JSON schema, `Lark` a rule's right side.
    """

    alternatives: Sequence[Sequence[str | Mapping[str, Any] | Lark]]

    def rules(self, name: str, special: Mapping[str, int]) -> list[str]:
        """Lark rules of which the first is called `name`."""
        options, rules = [], []
        for i, parts in enumerate(self.alternatives):
            symbols = []
            for j, part in enumerate(parts):
                if isinstance(part, str):
                    symbols.append(quoted(part, special))
                    continue
                symbols.append(symbol := f"{name}_{i}_{j}")
                right = part.text if isinstance(part, Lark) else f"%json {json.dumps(part)}"
                rules.append(f"{symbol}: {right}")
            options.append(" ".join(symbol for symbol in symbols if symbol))
        return [f"{name}: {' | '.join(options)}", *rules]


@dataclass(frozen=True)
class Lark:
    """The right side of a rule."""

    text: str


def quoted(text: str, special: Mapping[str, int] | None = None) -> str:
    """A literal of a Lark grammar; markers in it that are special tokens are named by their ids."""
    for marker, token in (special or {}).items():
        if marker in text:
            before, after = text.split(marker, 1)
            parts = (quoted(before, special), f"<[{token}]>", quoted(after, special))
            return " ".join(part for part in parts if part)
    return json.dumps(text, ensure_ascii=False) if text else ""


class Marked:
    """Finds markers in a text that comes in pieces."""

    def __init__(self) -> None:
        self.buffer = ""

    def before(self, *markers: str) -> tuple[str, str | None]:
        """Takes what stands before the first of the markers, and the marker itself if one is there.

        Returns:
            The text, and the marker found; without one what may be the beginning of one stays.
        """
        places = [(at, marker) for marker in markers if (at := self.buffer.find(marker)) >= 0]
        if places:
            at, marker = min(places)
            text, self.buffer = self.buffer[:at], self.buffer[at + len(marker) :]
            return text, marker
        longest = max(map(len, markers)) - 1
        ends = (self.buffer[-n:] for n in range(min(longest, len(self.buffer)), 0, -1))
        held = next((len(end) for end in ends if any(m.startswith(end) for m in markers)), 0)
        text, self.buffer = self.buffer[: len(self.buffer) - held], self.buffer[len(self.buffer) - held :]
        return text, None

    def take(self) -> str:
        """Takes all that is left."""
        text, self.buffer = self.buffer, ""
        return text


class BufferedParser(Parser):
    """Reads on for as long as what has come allows a step."""

    def __init__(self) -> None:
        self._text = Marked()

    def feed(self, text: str) -> list[Event]:
        """See `Parser`."""
        self._text.buffer += text
        events: list[Event] = []
        while self._text.buffer and self._advance(events):
            pass
        return events

    @abstractmethod
    def _advance(self, events: list[Event]) -> bool:
        """Takes a step; False: more text is needed."""
