"""Anthropic's API: the engine's outputs in its words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from curkv.engine.types import Output
from curkv.server.blocks import Block, Change
from curkv.server.chat.tools import readable_arguments
from curkv.server.dialects import BlockAnswer
from curkv.server.errors import APIError, MessagesError
from curkv.server.messages.protocol import (
    BlockDelta,
    BlockStart,
    BlockStop,
    Content,
    Ending,
    InputDelta,
    MessageDelta,
    MessagesResponse,
    MessageStart,
    MessageStop,
    MessagesUsage,
    StopReason,
    TextContent,
    TextDelta,
    ThinkingContent,
    ThinkingDelta,
    ToolUseContent,
)
from curkv.server.streaming import event


class MessagesAnswer(BlockAnswer):
    """Answer to POST /v1/messages."""

    def whole(self) -> MessagesResponse:
        """See `Answer`."""
        return self._response([_content(block) for block in self.blocks], self._ending)

    def beginning(self) -> str:
        """See `BlockAnswer`."""
        return _event(MessageStart(message=self._response([], Ending(stop_reason=None, stop_sequence=None))))

    def worded(self, changes: Sequence[Change], output: Output) -> str:
        """See `BlockAnswer`."""
        return "".join(map(self._change, changes))

    def _change(self, change: Change) -> str:
        block = change.block
        if change.what == "begin":
            return _event(BlockStart(index=block.index, content_block=_content(block)))
        if change.what == "end":
            return _event(BlockStop(index=block.index))
        return _event(BlockDelta(index=block.index, delta=_delta(block, change.text)))

    def ending(self) -> str:
        """See `Answer`."""
        return _event(MessageDelta(delta=self._ending, usage=self._usage)) + _event(MessageStop())

    def failing(self, error: APIError) -> str:
        """See `Answer`."""
        return _event(MessagesError.of(error))

    def _response(self, content: list[Content], ending: Ending) -> MessagesResponse:
        g = self.generation
        return MessagesResponse(
            id=g.id,
            model=g.model,
            content=content,
            stop_reason=ending.stop_reason,
            stop_sequence=ending.stop_sequence,
            usage=self._usage,
        )

    @property
    def _usage(self) -> MessagesUsage:
        usage = self.usage
        cached = usage.prompt_tokens_details.cached_tokens
        return MessagesUsage(
            input_tokens=usage.prompt_tokens - cached,
            output_tokens=usage.completion_tokens,
            cache_read_input_tokens=cached,
            kv=usage.kv,
        )

    @property
    def _ending(self) -> Ending:
        met = self.last.stop_reason if isinstance(self.last.stop_reason, str) else None
        reason: StopReason = "end_turn" if met is None else "stop_sequence"
        if self.last.finish_reason == "length":
            reason, met = "max_tokens", None
        elif self.called:
            reason, met = "tool_use", None
        return Ending(stop_reason=reason, stop_sequence=met)


def _content(block: Block) -> Content:
    if block.kind == "call":
        return ToolUseContent(id=block.id, name=block.name, input=_input(block.text))
    if block.kind == "reasoning":
        return ThinkingContent(thinking=block.text)
    return TextContent(text=block.text)


def _input(arguments: str) -> Any:
    """The arguments as an object; what was cut off by the end of the answer is no JSON, and stays text."""
    return readable_arguments(arguments) if arguments else {}


def _delta(block: Block, text: str) -> TextDelta | InputDelta | ThinkingDelta:
    if block.kind == "call":
        return InputDelta(partial_json=text)
    return ThinkingDelta(thinking=text) if block.kind == "reasoning" else TextDelta(text=text)


def _event(data: Any) -> str:
    return event(data, data.type)
