"""`<tool_call>` around JSON: Hermes, Qwen 2.5 and 3, SmolLM 2 and 3, Granite; and models without a format."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import ClassVar

from curkv.models.tools.base import Event, Grammar, Marked, Parser, Text, Tool, ToolFormat
from curkv.models.tools.json_calls import JSONCalls

_BEGIN, _END = "<tool_call>", "</tool_call>"


def named_object(tool: Tool, arguments: str = "arguments") -> tuple[str, dict[str, object], str]:
    """A call as a JSON object: parts of a `Grammar`."""
    return f'{{"name": {json.dumps(tool.name)}, "{arguments}": ', tool.schema, "}"


class Hermes(ToolFormat):
    """Each call is a JSON object between tags."""

    name = "hermes"
    trigger = _BEGIN
    markers: ClassVar[tuple[str, ...]] = (_BEGIN, _END)

    def body(self, tools: Sequence[Tool]) -> Grammar:
        """See `ToolFormat`."""
        calls = [named_object(tool) for tool in tools]
        return Grammar([(f"\n{begin}", schema, f"{end}\n{_END}") for begin, schema, end in calls])

    def parser(self, tools: Iterable[str]) -> Parser:
        """See `ToolFormat`."""
        return TaggedParser(tools, _BEGIN, _END)


class TaggedParser(Parser):
    """Reads JSON calls behind a marker.

    Args:
        tools: names of the tools there are.
        begin: the marker.
        end: what ends the calls behind it; None: only the end of the answer does.
    """

    def __init__(self, tools: Iterable[str], begin: str, end: str | None):
        self._tools = frozenset(tools)
        self._begin, self._end = begin, end
        self._text = Marked()
        self._calls: JSONCalls | None = None
        self._index = 0

    def feed(self, text: str) -> list[Event]:
        """See `Parser`."""
        events: list[Event] = []
        while text or self._calls is None:
            if self._calls is not None:
                events += self._calls.feed(text)
                if not self._calls.ended:
                    break
                text, self._index, self._calls = self._calls.rest, self._calls.index, None
                continue
            self._text.buffer += text
            before, found = self._text.before(self._begin)
            if before and not (self._index and before.isspace()):  # line breaks between calls say nothing
                events.append(Text(before))
            if not found:
                break
            text, self._calls = self._text.take(), JSONCalls(self._tools, found, self._end, self._index)
        return events

    def finish(self) -> list[Event]:
        """See `Parser`."""
        if self._calls is not None:
            return self._calls.finish()
        left = self._text.take()
        return [Text(left)] if left else []
