"""Ollama's API: the engine's outputs in its words."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, ClassVar

from curkv.engine.types import Output
from curkv.server.blocks import Block, Change
from curkv.server.chat.conversation import Conversation
from curkv.server.chat.protocol import ChatLogprob
from curkv.server.chat.serving import worded_logprobs
from curkv.server.chat.tools import readable_arguments
from curkv.server.dialects import BlockAnswer
from curkv.server.errors import APIError, OllamaError
from curkv.server.ollama.protocol import AnsweredCall, OllamaFunction, OllamaMessage, OllamaResponse

JSON_LINES = "application/x-ndjson"
_NANOSECONDS = 1_000_000_000


class OllamaAnswer(BlockAnswer):
    """Answer to POST /api/chat, or to POST /api/generate.

    Args:
        conversation: what the engine is asked.
        plain: the answer is a text and not a message.
    """

    media_type: ClassVar[str] = JSON_LINES

    def __init__(self, conversation: Conversation, plain: bool):
        super().__init__(conversation)
        self._plain = plain
        self._logprobs = bool(conversation.body.logprobs)
        self._all_logprobs: list[ChatLogprob] = []
        self._began = time.monotonic()
        self._first: float | None = None

    def worded(self, changes: Sequence[Change], output: Output) -> str:
        """See `BlockAnswer`."""
        text, thought = _said(changes, "text"), _said(changes, "reasoning")
        calls = [_call(c.block) for c in changes if c.what == "end" and c.block.kind == "call"]
        if not (text or thought or calls or self._logprobs):
            return ""
        return _line(self._worded(text, thought, calls, self._worded_logprobs(output)))

    def add(self, choice: int, output: Output) -> None:
        """See `Answer`."""
        super().add(choice, output)
        self._all_logprobs += self._worded_logprobs(output) or []

    def whole(self) -> OllamaResponse:
        """See `Answer`."""
        text = "".join(block.text for block in self.blocks if block.kind == "text")
        thought = "".join(block.text for block in self.blocks if block.kind == "reasoning")
        calls = [_call(block) for block in self.blocks if block.kind == "call"]
        worded = self._worded(text, thought, calls, self._all_logprobs if self._logprobs else None)
        return worded.model_copy(update=self._end)

    def ending(self) -> str:
        """See `Answer`."""
        return _line(self._worded("", "", [], None).model_copy(update=self._end))

    def failing(self, error: APIError) -> str:
        """See `Answer`."""
        return OllamaError.of(error).model_dump_json() + "\n"

    def _take(self, output: Output) -> list[Change]:
        if self._first is None:
            self._first = time.monotonic()
        return super()._take(output)

    def _worded_logprobs(self, output: Output) -> list[ChatLogprob] | None:
        if not self._logprobs:
            return None
        return worded_logprobs(self.generation.client.vocabulary, output.logprobs or ())

    def _worded(
        self, text: str, thought: str, calls: list[AnsweredCall], logprobs: list[ChatLogprob] | None
    ) -> OllamaResponse:
        answer = OllamaResponse(
            model=self.generation.model, created_at=timestamp(time.time()), done=False, logprobs=logprobs
        )
        if self._plain:
            return answer.model_copy(update={"response": text, "thinking": thought or None})
        message = OllamaMessage(content=text, thinking=thought or None, tool_calls=calls or None)
        return answer.model_copy(update={"message": message})

    @property
    def _end(self) -> dict[str, Any]:
        """Fields that come with the end of an answer."""
        now, usage = time.monotonic(), self.usage
        first = self._first or now
        return {
            "done": True,
            "done_reason": "length" if self.last.finish_reason == "length" else "stop",
            "total_duration": nanoseconds(now - self._began),
            "load_duration": 0,
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": nanoseconds(first - self._began),
            "eval_count": usage.completion_tokens,
            "eval_duration": nanoseconds(now - first),
            "kv": usage.kv,
        }


def loaded(model: str, plain: bool) -> OllamaResponse:
    """Answer to a request that only asks whether the model is there."""
    nothing: dict[str, Any] = {"response": ""} if plain else {"message": OllamaMessage()}
    return OllamaResponse(
        model=model, created_at=timestamp(time.time()), done=True, done_reason="load", **nothing
    )


def timestamp(seconds: float) -> str:
    """A Unix time as Ollama writes times."""
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def nanoseconds(seconds: float) -> int:
    """A duration as Ollama writes them."""
    return int(seconds * _NANOSECONDS)


def _said(changes: Sequence[Change], kind: str) -> str:
    return "".join(change.text for change in changes if change.block.kind == kind)


def _call(block: Block) -> AnsweredCall:
    arguments = readable_arguments(block.text)
    given = arguments if isinstance(arguments, dict) else {}
    return AnsweredCall(id=block.id, function=OllamaFunction(name=block.name, arguments=given))


def _line(answer: OllamaResponse) -> str:
    return answer.model_dump_json() + "\n"
