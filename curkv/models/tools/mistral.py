"""`[TOOL_CALLS]`: a list of JSON objects, or since Mistral Small 3.2 a name and `[ARGS]`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from curkv.models.tools.base import (
    Arguments,
    BufferedParser,
    Call,
    Event,
    Grammar,
    Parser,
    Text,
    Tool,
    ToolFormat,
)
from curkv.models.tools.hermes import TaggedParser, named_object
from curkv.models.tools.json_calls import Braces

_BEGIN, _ARGUMENTS = "[TOOL_CALLS]", "[ARGS]"


class MistralList(ToolFormat):
    """A list of objects behind the marker."""

    name = "mistral"
    trigger = _BEGIN
    between = ""
    markers: ClassVar[tuple[str, ...]] = (_BEGIN,)

    def body(self, tools: Sequence[Tool]) -> Grammar:
        """See `ToolFormat`."""
        calls = [named_object(tool) for tool in tools]
        return Grammar([(f"[{begin}", schema, f"{end}]") for begin, schema, end in calls])

    def parser(self, tools: Iterable[str]) -> Parser:
        """See `ToolFormat`."""
        return TaggedParser(tools, _BEGIN, None)


class MistralNamed(ToolFormat):
    """Marker, name, second marker, arguments."""

    name = "mistral-named"
    trigger = _BEGIN
    between = ""
    markers: ClassVar[tuple[str, ...]] = (_BEGIN, _ARGUMENTS)

    def body(self, tools: Sequence[Tool]) -> Grammar:
        """See `ToolFormat`."""
        return Grammar([(f"{tool.name}{_ARGUMENTS}", tool.schema) for tool in tools])

    def parser(self, tools: Iterable[str]) -> Parser:
        """See `ToolFormat`."""
        return _NamedParser(tools)


class _NamedParser(BufferedParser):
    def __init__(self, tools: Iterable[str]):
        super().__init__()
        self._tools = frozenset(tools)
        self._naming = False
        self._arguments: Braces | None = None
        self._index = -1

    def _advance(self, events: list[Event]) -> bool:
        buffer = self._text.buffer
        if self._arguments is not None:
            taken = self._arguments.take(buffer)
            events.append(Arguments(self._index, buffer[:taken]))
            self._text.buffer = buffer[taken:]
            if self._arguments.closed:
                self._arguments = None
            return True
        if self._naming:
            at = buffer.find(_ARGUMENTS)
            if at < 0:
                return False
            self._naming, name = False, buffer[:at].strip()
            self._text.buffer = buffer[at + len(_ARGUMENTS) :]
            if name not in self._tools:
                events.append(Text(_BEGIN + buffer[: at + len(_ARGUMENTS)]))
                return True
            self._index += 1
            self._arguments = Braces()
            events.append(Call(self._index, name))
            return True
        before, found = self._text.before(_BEGIN)
        self._naming = found is not None
        if before:
            events.append(Text(before))
        return self._naming

    def finish(self) -> list[Event]:
        """See `Parser`."""
        left = _BEGIN * self._naming + self._text.take()
        return [Text(left)] if left and self._arguments is None else []
