"""An answer as a row of blocks, one after the other: reasoning, text, calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

Kind = Literal["reasoning", "text", "call"]


@dataclass
class Block:
    """A block of an answer.

    Attributes:
        index: its place in the answer.
        kind: what it is.
        text: what is in it so far; of a call its arguments, a JSON object as text.
        id: of a call.
        name: of the function that a call calls.
    """

    index: int
    kind: Kind
    text: str = ""
    id: str = ""
    name: str = ""


@dataclass(frozen=True)
class Change:
    """What happens to a block: it begins, gets a piece of text, or ends.

    Attributes:
        what: which of these.
        block: the block; where it begins, without text.
        text: of the piece.
    """

    what: Literal["begin", "piece", "end"]
    block: Block
    text: str = ""


class Blocks:
    """Makes blocks of the news of one choice's message.

    White space alone between blocks makes none; it belongs to the text that follows it.

    Attributes:
        blocks: all so far.
    """

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self._open: Block | None = None
        self._space = ""

    def take(self, news: Mapping[str, Any], last: bool) -> list[Change]:
        """Takes the fields of a delta, see `Spoken.take`; returns what they do to the blocks."""
        return list(self._changes(news, last))

    def _changes(self, news: Mapping[str, Any], last: bool) -> Iterator[Change]:
        if reasoning := news.get("reasoning_content"):
            yield from self._add("reasoning", reasoning)
        if text := news.get("content"):
            yield from self._add("text", text)
        for delta in news.get("tool_calls", ()):
            if delta.id is not None:
                yield from self._begin(
                    Block(len(self.blocks), "call", id=delta.id, name=delta.function.name or "")
                )
            yield from self._piece(delta.function.arguments or "")
        if last:
            if self._space and not self.blocks:
                yield from self._begin(Block(0, "text"))
                yield from self._piece(self._space)
            yield from self._end()

    def _add(self, kind: Kind, text: str) -> Iterator[Change]:
        if self._open is None or self._open.kind != kind:
            text, self._space = self._space + text, ""
            if text.isspace():
                self._space = text
                return
            yield from self._begin(Block(len(self.blocks), kind))
        yield from self._piece(text)

    def _begin(self, block: Block) -> Iterator[Change]:
        yield from self._end()
        self.blocks.append(block)
        self._open = block
        yield Change("begin", replace(block))  # as it is now

    def _piece(self, text: str) -> Iterator[Change]:
        if text and self._open is not None:
            self._open.text += text
            yield Change("piece", self._open, text)

    def _end(self) -> Iterator[Change]:
        if self._open is not None:
            yield Change("end", self._open)
            self._open = None
