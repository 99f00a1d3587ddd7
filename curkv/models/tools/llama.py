"""Llama 3.x: a bare JSON object with `parameters`, perhaps behind `<|python_tag|>`, is the whole answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

from curkv.models.tools.base import Event, Grammar, Parser, Text, Tool, ToolFormat, quoted
from curkv.models.tools.hermes import named_object
from curkv.models.tools.json_calls import JSONCalls

_TAG = "<|python_tag|>"
_BEGIN = '{"name": '


class LlamaJSON(ToolFormat):
    """An answer that begins with a brace is calls, parted by semicolons; any other is text."""

    name = "llama-json"
    trigger = _BEGIN
    between = "; "
    markers: ClassVar[tuple[str, ...]] = (_TAG,)

    def body(self, tools: Sequence[Tool]) -> Grammar:
        """See `ToolFormat`."""
        calls = [named_object(tool, "parameters") for tool in tools]
        return Grammar([(begin.removeprefix(_BEGIN), schema, end) for begin, schema, end in calls])

    def allowed(self, tools: Sequence[Tool], parallel: bool, special: Mapping[str, int]) -> str:
        """See `ToolFormat`; calls stand only at the beginning."""
        more = f" ({quoted(self.between)} {quoted(self.trigger)} body)*" * parallel
        rules = [f"start: TEXT | head body{more}", f"head[lazy]: {quoted(self.trigger)}", r"TEXT: /(.|\n)*/"]
        return "\n".join([*rules, *self.body(tools).rules("body", special)])

    def parser(self, tools: Iterable[str]) -> Parser:
        """See `ToolFormat`."""
        return _BareParser(tools)


class _BareParser(Parser):
    """Holds back the first characters until they can be no call."""

    def __init__(self, tools: Iterable[str]):
        self._calls: JSONCalls | None = JSONCalls(tools, "", None)
        self._head = ""
        self._begun = False

    def feed(self, text: str) -> list[Event]:
        """See `Parser`."""
        if self._begun:
            return self._calls.feed(text) if self._calls is not None else [Text(text)] if text else []
        self._head += text
        head = self._head.lstrip()
        if not head or _TAG.startswith(head):
            return []
        head = head.removeprefix(_TAG).lstrip()
        if not head:
            return []
        self._begun = True
        if not head.startswith(("{", "[")):
            self._calls = None
            return [Text(self._head)]
        assert self._calls is not None
        return self._calls.feed(head)

    def finish(self) -> list[Event]:
        """See `Parser`."""
        if not self._begun:
            return [Text(self._head)] if self._head else []
        return self._calls.finish() if self._calls is not None else []
