"""OpenAI's newer API: the engine's outputs in its words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from curkv.engine.types import Output
from curkv.server.blocks import Block, Change
from curkv.server.chat.conversation import Conversation
from curkv.server.chat.protocol import Message
from curkv.server.chat.serving import worded_logprobs
from curkv.server.dialects import BlockAnswer
from curkv.server.errors import APIError
from curkv.server.responses.protocol import (
    CallItem,
    Incomplete,
    InputDetails,
    Item,
    MessageItem,
    OutputCall,
    OutputItem,
    OutputLogprob,
    OutputMessage,
    OutputReasoning,
    OutputText,
    ReasoningItem,
    ReasoningText,
    ResponseFailure,
    ResponseObject,
    ResponsesRequest,
    ResponsesUsage,
    Status,
    StreamEvent,
    TextItem,
    as_messages,
)
from curkv.server.streaming import event

_PREFIXES = {"text": "msg", "call": "fc", "reasoning": "rs"}


class ResponsesAnswer(BlockAnswer):
    """Answer to POST /v1/responses.

    Args:
        conversation: what the engine is asked.
        body: what was asked.
        keep: called with the answer and its JSON once it is whole.
    """

    def __init__(
        self,
        conversation: Conversation,
        body: ResponsesRequest,
        keep: Callable[[ResponseObject, str], None],
    ):
        super().__init__(conversation)
        self._body = body
        self._keep = keep
        self._logprobs: list[OutputLogprob] = []
        self._sent = 0

    def whole(self) -> ResponseObject:
        """See `Answer`."""
        answer = self._response(self._status)
        self._keep(answer, answer.model_dump_json())
        return answer

    def beginning(self) -> str:
        """See `BlockAnswer`."""
        begun = self._response("in_progress")
        return self._event("response.created", response=begun) + self._event(
            "response.in_progress", response=begun
        )

    def worded(self, changes: Sequence[Change], output: Output) -> str:
        """See `BlockAnswer`."""
        return "".join(map(self._change, changes))

    def _change(self, change: Change) -> str:
        block = change.block
        place = {"item_id": self._id(block), "output_index": block.index}
        if change.what == "begin":
            added = self._event(
                "response.output_item.added", output_index=block.index, item=self._begun(block)
            )
            return added + self._part("added", block, place, "")
        if change.what == "piece":
            return self._event(f"{_EVENTS[block.kind]}.delta", **place, **_within(block), delta=change.text)
        done = self._event(f"{_EVENTS[block.kind]}.done", **place, **_within(block), **_whole(block))
        part = self._part("done", block, place, block.text)
        item = self._item(block, "completed")
        return done + part + self._event("response.output_item.done", output_index=block.index, item=item)

    def ending(self) -> str:
        """See `Answer`."""
        answer = self.whole()
        return self._event(f"response.{answer.status}", response=answer)

    def failing(self, error: APIError) -> str:
        """See `Answer`."""
        detail = error.body.error
        failure = ResponseFailure(code=detail.code or detail.type, message=detail.message)
        answer = self._response("failed").model_copy(update={"error": failure})
        return self._event("response.failed", response=answer)

    def _take(self, output: Output) -> list[Change]:
        if self._body.reports_logprobs:
            worded = worded_logprobs(self.generation.client.vocabulary, output.logprobs or ())
            self._logprobs += [OutputLogprob.model_validate(entry.model_dump()) for entry in worded]
        return super()._take(output)

    def _part(self, what: str, block: Block, place: dict[str, Any], text: str) -> str:
        if block.kind == "call":
            return ""
        part = OutputText(text=text) if block.kind == "text" else ReasoningText(text=text)
        return self._event(f"response.content_part.{what}", **place, content_index=0, part=part)

    def _begun(self, block: Block) -> OutputItem:
        item = self._item(block, "in_progress")
        return item if isinstance(item, OutputCall) else item.model_copy(update={"content": []})

    def _item(self, block: Block, status: Status) -> OutputItem:
        if block.kind == "call":
            return OutputCall(
                id=self._id(block), call_id=block.id, name=block.name, arguments=block.text, status=status
            )
        if block.kind == "reasoning":
            return OutputReasoning(
                id=self._id(block), content=[ReasoningText(text=block.text)], status=status
            )
        return OutputMessage(
            id=self._id(block), content=[OutputText(text=block.text, logprobs=self._logprobs)], status=status
        )

    def _id(self, block: Block) -> str:
        return f"{_PREFIXES[block.kind]}_{self.generation.id.removeprefix('resp-')}_{block.index}"

    @property
    def _status(self) -> Status:
        return "incomplete" if self.last.finish_reason == "length" else "completed"

    def _response(self, status: Status) -> ResponseObject:
        g, body = self.generation, self._body
        ended = status in ("completed", "incomplete")
        items = [self._item(block, "completed") for block in self.blocks]
        if status == "incomplete" and items:
            items[-1] = self._item(self.blocks[-1], "incomplete")
        usage = self.usage
        counted = ResponsesUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputDetails(cached_tokens=usage.prompt_tokens_details.cached_tokens),
            output_tokens=usage.completion_tokens,
            total_tokens=usage.total_tokens,
            kv=usage.kv,
        )
        asked = body.model_dump(mode="json", by_alias=True, exclude_unset=True)
        return ResponseObject(
            id=g.id,
            created_at=g.created,
            status=status,
            incomplete_details=Incomplete() if status == "incomplete" else None,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata or {},
            model=g.model,
            output=items,
            parallel_tool_calls=body.parallel_tool_calls is not False,
            previous_response_id=body.previous_response_id,
            reasoning=asked.get("reasoning") or {"effort": None, "summary": None},
            store=body.store is not False,
            temperature=body.temperature if body.temperature is not None else 1.0,
            text=asked.get("text") or {"format": {"type": "text"}},
            tool_choice=asked.get("tool_choice") or "auto",
            tools=asked.get("tools") or [],
            top_p=body.top_p if body.top_p is not None else 1.0,
            top_logprobs=body.top_logprobs or 0,
            usage=counted if ended else None,
        )

    def _event(self, kind: str, **fields: Any) -> str:
        number, self._sent = self._sent, self._sent + 1
        return event(StreamEvent(type=kind, sequence_number=number, **fields), kind)


_EVENTS = {
    "text": "response.output_text",
    "call": "response.function_call_arguments",
    "reasoning": "response.reasoning_text",
}


def _within(block: Block) -> dict[str, Any]:
    """Where in its item a piece stands."""
    if block.kind == "call":
        return {}
    return {"content_index": 0, **({"logprobs": []} if block.kind == "text" else {})}


def _whole(block: Block) -> dict[str, Any]:
    """The text of a block, as the event that ends it calls it."""
    if block.kind == "call":
        return {"arguments": block.text, "name": block.name}
    return {"text": block.text}


def answered(answer: ResponseObject) -> list[Message]:
    """An answer as messages of a conversation that goes on."""
    items: list[Item] = []
    for item in answer.output:
        match item:
            case OutputMessage():
                items.append(MessageItem(role="assistant", content=item.content[0].text))
            case OutputCall(call_id=called, name=name, arguments=arguments):
                items.append(CallItem(type="function_call", call_id=called, name=name, arguments=arguments))
            case OutputReasoning():
                thought = TextItem(type="reasoning_text", text=item.content[0].text)
                items.append(ReasoningItem(type="reasoning", content=[thought]))
    return as_messages(items)
