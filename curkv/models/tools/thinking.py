"""Reasoning between tags, before the answer that another parser reads."""

from __future__ import annotations

from curkv.models.tools.base import Event, Marked, Parser, Reasoning, Text

_BEGIN, _END = "<think>", "</think>"


class ThinkingParser(Parser):
    """Parts `<think>...</think>` at the beginning of an answer from the rest.

    Args:
        rest: reads what follows; None: it is text.
        begun: the prompt ends within the tags already.
    """

    def __init__(self, rest: Parser | None = None, begun: bool = False):
        self._rest = rest
        self._text = Marked()
        self._state = "thinking" if begun else "before"
        self._fresh = begun

    def feed(self, text: str) -> list[Event]:
        """See `Parser`."""
        if self._state == "after":
            return self._hand_on(text)
        self._text.buffer += text
        if self._state == "before":
            head = self._text.buffer.lstrip()
            if not head or (_BEGIN.startswith(head) and head != _BEGIN):
                return []
            if not head.startswith(_BEGIN):
                self._state = "after"
                return self._hand_on(self._text.take())
            self._state, self._text.buffer = "thinking", head.removeprefix(_BEGIN)
            self._fresh = True
        thought, ended = self._text.before(_END)
        thought = self._without_breaks(thought)
        events: list[Event] = [Reasoning(thought)] if thought else []
        if ended:
            self._state, self._fresh = "after", True
            events += self._hand_on(self._text.take())
        return events

    def _without_breaks(self, text: str) -> str:
        """Leaves out the line breaks behind a tag."""
        text = text.lstrip("\n") if self._fresh else text
        self._fresh = self._fresh and not text
        return text

    def _hand_on(self, text: str) -> list[Event]:
        text = self._without_breaks(text)
        if self._rest is not None:
            return self._rest.feed(text)
        return [Text(text)] if text else []

    def finish(self) -> list[Event]:
        """See `Parser`."""
        left, thinking = self._text.take(), self._state == "thinking"
        events: list[Event] = []
        if left:
            events = [Reasoning(left)] if thinking else self._hand_on(left)
        return events + (self._rest.finish() if self._rest is not None else [])
