"""Calls written as JSON objects, read while they come."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from curkv.models.tools.base import Arguments, Call, Event, Text

_HEADER = re.compile(
    r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)', re.DOTALL
)
_BETWEEN = " \t\r\n,;[]"


class JSONCalls:
    """Objects with a `name` and `arguments` (or `parameters`), one after the other or in a list.

    Args:
        tools: names of the tools there are.
        begin: the marker that was read before them, which is text if no call follows.
        end: what ends the calls; None: only the end of the answer does.
        first: index of the first call.
    """

    def __init__(self, tools: Iterable[str], begin: str, end: str | None, first: int = 0):
        self.index = self._first = first
        self.ended = False
        self.rest = ""
        self._tools = frozenset(tools)
        self._begin, self._end = begin, end
        self._buffer = ""
        self._arguments: Braces | None = None
        self._closing: Braces | None = None

    def feed(self, text: str) -> list[Event]:
        """Takes a piece; behind the end marker, `ended` is set and `rest` is what follows it."""
        self._buffer += text
        events: list[Event] = []
        while self._buffer and not self.ended and self._advance(events):
            pass
        return events

    def finish(self) -> list[Event]:
        """What was read without being a call."""
        left, self._buffer = self._buffer, ""
        if self._arguments is not None or self._closing is not None:
            return []
        rest = left.strip(_BETWEEN)
        if self.index > self._first and (self._end or "").startswith(rest):
            return []  # the answer was cut off behind a call, maybe within the end marker
        return self._said(left)

    def _said(self, text: str) -> list[Event]:
        """Text where a call was expected; the marker belongs to it unless a call has been read."""
        if self.index == self._first:
            text, self._begin = self._begin + text, ""
        return [Text(text)] if text else []

    def _advance(self, events: list[Event]) -> bool:
        """One step onwards; False: more text is needed."""
        if self._arguments is not None:
            taken = self._arguments.take(self._buffer)
            events.append(Arguments(self.index, self._buffer[:taken]))
            self._buffer = self._buffer[taken:]
            if self._arguments.closed:
                self._arguments, self._closing = None, Braces(depth=1)
            return True
        if self._closing is not None:
            self._buffer = self._buffer[self._closing.take(self._buffer) :]
            if self._closing.closed:
                self._closing, self.index = None, self.index + 1
            return True
        return self._next(events)

    def _next(self, events: list[Event]) -> bool:
        """Reads up to the arguments of the next call, or the end."""
        found = self._buffer.lstrip(_BETWEEN)
        if self._end is not None and found.startswith(self._end):
            if self.index == self._first:
                events += self._said(self._end)
            self.ended, self.rest, self._buffer = True, found[len(self._end) :], ""
            return False
        if match := _HEADER.match(found):
            name = json.loads(match[1])
            if name in self._tools:
                events.append(Call(self.index, name))
                self._arguments, self._buffer = Braces(), found[match.end() :]
                return True
        return self._whole(found, events)

    def _whole(self, found: str, events: list[Event]) -> bool:
        """Reads a complete object whose keys stand otherwise."""
        try:
            value, length = json.JSONDecoder().raw_decode(found)
        except ValueError:
            if self._end is None or (at := found.find(self._end)) < 0:
                return False
            events += self._said(found[:at])
            self._buffer = found[at:]
            return True
        call = _read(value, self._tools)
        if call is None:
            events += self._said(found[:length])
        else:
            events += [Call(self.index, call[0]), Arguments(self.index, call[1])]
            self.index += 1
        self._buffer = found[length:]
        return True


def _read(value: Any, tools: frozenset[str]) -> tuple[str, str] | None:
    """Name and arguments of a decoded call; None if it is none."""
    if not isinstance(value, dict):
        return None
    function: dict[str, Any] = value["function"] if isinstance(value.get("function"), dict) else value
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return None
    name = function.get("name")
    if name not in tools or not isinstance(arguments, dict):
        return None
    return name, json.dumps(arguments, ensure_ascii=False)


class Braces:
    """Follows a JSON object to its closing brace.

    Args:
        depth: braces and brackets that are open already.
    """

    def __init__(self, depth: int = 0):
        self.closed = False
        self._depth = depth
        self._quoted = self._escaped = False

    def take(self, text: str) -> int:
        """Characters of the text that belong to the object."""
        for i, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped = character == "\\"
                self._quoted = character != '"'
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.closed = True
                    return i + 1
        return len(text)
