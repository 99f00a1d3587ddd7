"""gpt-oss: an answer is messages on channels; reasoning is one, and calls are messages to a function."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

from curkv.models.tools.base import (
    Arguments,
    BufferedParser,
    Call,
    Event,
    Grammar,
    Parser,
    Reasoning,
    Text,
    Tool,
    ToolFormat,
    quoted,
)

_CHANNEL, _MESSAGE, _CONSTRAIN = "<|channel|>", "<|message|>", "<|constrain|>"
_START, _END, _CALL, _RETURN = "<|start|>", "<|end|>", "<|call|>", "<|return|>"
_TO = "commentary to=functions."


class Harmony(ToolFormat):
    """The channel says what a message is: reasoning, text, or the arguments of a call."""

    name = "harmony"
    trigger = f"{_CHANNEL}{_TO}"
    between = f"{_CALL}{_START}assistant"
    markers: ClassVar[tuple[str, ...]] = (
        _CHANNEL,
        _MESSAGE,
        _CONSTRAIN,
        _START,
        _END,
        _CALL,
        _RETURN,
    )

    def body(self, tools: Sequence[Tool]) -> Grammar:
        """See `ToolFormat`."""
        return Grammar([(f"{tool.name} {_CONSTRAIN}json{_MESSAGE}", tool.schema) for tool in tools])

    def allowed(self, tools: Sequence[Tool], parallel: bool, special: Mapping[str, int]) -> str:
        """See `ToolFormat`; each message is one on another channel, or a call."""
        channel, message = quoted(_CHANNEL, special), quoted(_MESSAGE, special)
        closed = quoted(f"{_END}{_START}assistant", special)
        rules = [
            f"start: (said {closed})* (said | {channel} {quoted(_TO)} body)",
            f"said: {channel} KIND {message} WORDS",
            "KIND: /analysis|commentary|final/",
            r"WORDS: /(.|\n)*/",
        ]
        return "\n".join([*rules, *self.body(tools).rules("body", special)])

    def parser(self, tools: Iterable[str]) -> Parser:
        """See `ToolFormat`."""
        return _ChannelParser(tools)


class _ChannelParser(BufferedParser):
    """Alternates between a message's header and its body."""

    def __init__(self, tools: Iterable[str]):
        super().__init__()
        self._tools = frozenset(tools)
        self._header = True
        self._kind = "final"
        self._index = -1

    def _advance(self, events: list[Event]) -> bool:
        if self._header:
            return self._read_header(events)
        said, found = self._text.before(_END, _CALL, _RETURN, _START, _CHANNEL)
        self._say(said, events)
        if found in (_CHANNEL, _START):  # they begin the next header
            self._text.buffer = found + self._text.buffer
        self._header = found is not None
        return self._header

    def _read_header(self, events: list[Event]) -> bool:
        buffer = self._text.buffer
        if not any(buffer.startswith(m[: len(buffer)]) for m in (_CHANNEL, _START)):
            self._header, self._kind = False, "final"  # no header at all: an answer without channels
            return True
        at = buffer.find(_MESSAGE)
        if at < 0:
            return False
        header, self._text.buffer = buffer[:at], buffer[at + len(_MESSAGE) :]
        self._header = False
        called = re.search(r"to=functions\.([\w.-]+)", header)
        if called and called[1] in self._tools:
            self._index += 1
            self._kind = "call"
            events.append(Call(self._index, called[1]))
        else:
            self._kind = "analysis" if "analysis" in header else "final"
        return True

    def _say(self, text: str, events: list[Event]) -> None:
        if text and self._kind == "call":
            events.append(Arguments(self._index, text))
        elif text:
            events.append(Reasoning(text) if self._kind == "analysis" else Text(text))

    def finish(self) -> list[Event]:
        """See `Parser`."""
        events: list[Event] = []
        left = self._text.take()
        if not self._header:
            self._say(left, events)
        return events
