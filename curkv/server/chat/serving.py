"""Chat: a conversation in, and the engine's outputs in the words of the API."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from curkv.engine.types import InvalidRequest, Output, SamplingParams, TokenLogprob
from curkv.server.chat.protocol import (
    PART_SEPARATOR,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatLogprob,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    ChatResponse,
    Delta,
    FinishReason,
    Message,
    TopLogprob,
    context_ttl,
)
from curkv.server.chat.tools import Spoken, ToolUse, readable_arguments
from curkv.server.generation import Answer, Generation, Prompt
from curkv.server.protocol import Usage
from curkv.server.tokenizing import Reader

if TYPE_CHECKING:
    from curkv.engine.client import EngineClient
    from curkv.models.chat_template import ChatTemplate

_MARK = "\ue000"
"""A private-use character that stands at the context's end while its place in the text is looked for."""


def tokenize(
    messages: Sequence[Message],
    variables: Mapping[str, Any],
    client: EngineClient,
    reader: Reader,
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[Prompt]:
    """The conversation as the model reads it, in tokens.

    Raises:
        InvalidRequest: the model has no chat template, it does not take this conversation, or its text cannot
            fit into the context.
        APIError: 429, the queue has no room for so many tokens.
    """
    template = client.chat_template
    if template is None:
        raise InvalidRequest("the model has no chat template; use /v1/completions", "messages")
    try:
        text = template.render(_plain(messages), variables, tools)
        ids, ends = reader.tokens_with_ends(text, "messages")
        context_end = _context_end(text, messages, variables, template, tools)
    except ValueError as error:
        raise InvalidRequest(str(error), "messages") from error
    context = sum(end <= context_end for end in ends)
    return [Prompt(ids, text, context or None, context_ttl(messages))]


def _plain(messages: Sequence[Message], marked: tuple[int, int] | None = None) -> list[dict[str, Any]]:
    """Messages in the form of templates; with a mark behind part `marked[1]` of message `marked[0]`."""
    plain = []
    for i, message in enumerate(messages):
        texts = [text + _MARK * ((i, j) == marked) for j, (text, _) in enumerate(message.parts)]
        optional = ("name", "tool_call_id", "reasoning_content")
        given = {field: value for field in optional if (value := getattr(message, field)) is not None}
        if message.called:
            given["tool_calls"] = [
                {
                    **({"id": call.id} if call.id is not None else {}),
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": readable_arguments(call.function.arguments),
                    },
                }
                for call in message.called
            ]
        role = "tool" if message.role == "function" else message.role
        plain.append({"role": role, "content": PART_SEPARATOR.join(texts), **given})
    return plain


def with_tools(sampling: SamplingParams, tools: ToolUse, client: EngineClient) -> SamplingParams:
    """What the engine is to do so that an answer's calls are valid, and can be read.

    Raises:
        InvalidRequest: the model has no chat template, or calls cannot be had together with another field.
    """
    template = client.chat_template
    if template is None or not tools.callable:
        return sampling
    added = client.tokenizer.get_added_tokens_decoder()
    ids = {token.content: i for i, token in added.items() if token.special}
    special = {marker: ids[marker] for marker in template.tool_format.markers if marker in ids}
    structure = tools.structure(template, special, sampling.structure)
    return replace(sampling, structure=structure, skip_special_tokens=not special)


def _context_end(
    text: str,
    messages: Sequence[Message],
    variables: Mapping[str, Any],
    template: ChatTemplate,
    tools: Sequence[Mapping[str, Any]],
) -> int:
    """Characters of the rendered conversation up to the last part marked as the context's end; 0: none is.

    With something inserted at the mark, the text is the same exactly up to there, whatever the template does.
    """
    marks = [(i, j) for i, m in enumerate(messages) for j, (_, marked) in enumerate(m.parts) if marked]
    if not marks:
        return 0
    marked = template.render(_plain(messages, marks[-1]), variables, tools)
    return next((i for i, (a, b) in enumerate(zip(text, marked, strict=False)) if a != b), len(text))


def _call_id() -> str:
    """Nine letters and digits, which is what Mistral's templates insist on."""
    return uuid.uuid4().hex[:9]


class ChatAnswer(Answer):
    """Answer to POST /v1/chat/completions."""

    def __init__(self, generation: Generation, body: ChatRequest, tools: ToolUse):
        super().__init__(generation)
        self._body = body
        self._tools = tools
        template, prompt = generation.client.chat_template, generation.prompt_of(0).text or ""
        self._spoken = [
            Spoken(tools.parser(template, prompt) if template is not None else None, _call_id)
            for _ in range(generation.num_choices)
        ]
        self._choices = [
            ChatChoice(
                index=index,
                message=ChatMessage(content=""),
                logprobs=ChatLogprobs(content=[]) if body.logprobs else None,
                token_ids=[] if body.return_token_ids else None,
            )
            for index in range(generation.num_choices)
        ]
        self._begun = [False] * generation.num_choices

    def chunk(self, choice: int, output: Output) -> ChatChunk | None:
        """A chunk with one piece of one choice; the first one of a choice names the role."""
        begun, self._begun[choice] = self._begun[choice], True
        news = self._spoken[choice].take(output.text, output.finish_reason is not None)
        if self._tools.legacy and "tool_calls" in news:
            news["function_call"] = news.pop("tool_calls")[0].function
        if not begun:
            news = {"role": "assistant", "content": "", **news}
        piece = ChatChunkChoice(
            index=choice,
            delta=Delta(**news),
            logprobs=self._logprobs(output),
            finish_reason=self._finish_reason(choice, output),
            stop_reason=output.stop_reason,
            token_ids=output.token_ids if self._body.return_token_ids else None,
        )
        if not (news or piece.finish_reason or piece.token_ids or piece.logprobs):
            return None
        return self._chunk([piece], prompt_token_ids=None if begun else self._prompt_token_ids)

    def add(self, choice: int, output: Output) -> None:
        """Adds an output to its choice."""
        whole, spoken = self._choices[choice], self._spoken[choice]
        spoken.take(output.text, output.finish_reason is not None)
        whole.finish_reason = self._finish_reason(choice, output)
        whole.stop_reason = output.stop_reason
        if whole.token_ids is not None:
            whole.token_ids += output.token_ids
        if whole.logprobs is not None and (more := self._logprobs(output)) is not None:
            whole.logprobs.content += more.content

    def _finish_reason(self, choice: int, output: Output) -> FinishReason | None:
        if output.finish_reason == "stop" and self._spoken[choice].calls:
            return "function_call" if self._tools.legacy else "tool_calls"
        return cast("FinishReason | None", output.finish_reason)

    def whole(self, usage: Usage) -> ChatResponse:
        """All choices."""
        g = self.generation
        for choice, spoken in zip(self._choices, self._spoken, strict=True):
            message = choice.message
            message.content, message.reasoning_content = spoken.content, spoken.reasoning
            if self._tools.legacy:
                message.function_call = spoken.calls[0].function if spoken.calls else None
            else:
                message.tool_calls = spoken.calls or None
        return ChatResponse(
            id=g.id,
            created=g.created,
            model=g.model,
            choices=self._choices,
            usage=usage,
            prompt_token_ids=self._prompt_token_ids,
        )

    def usage_chunk(self, usage: Usage) -> ChatChunk:
        """A chunk without choices."""
        return self._chunk([], usage=usage)

    def _chunk(self, choices: list[ChatChunkChoice], **fields: Any) -> ChatChunk:
        g = self.generation
        return ChatChunk(id=g.id, created=g.created, model=g.model, choices=choices, **fields)

    @property
    def _prompt_token_ids(self) -> list[int] | None:
        return self.generation.prompt_of(0).token_ids if self._body.return_token_ids else None

    def _logprobs(self, output: Output) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        return ChatLogprobs(content=[self._logprob(entry) for entry in output.logprobs or ()])

    def _logprob(self, entry: TokenLogprob) -> ChatLogprob:
        top = [TopLogprob(**self._token(i, logprob)) for i, logprob in entry.top]
        return ChatLogprob(**self._token(entry.token_id, entry.logprob), top_logprobs=top)

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        vocabulary = self.generation.client.vocabulary
        text = vocabulary.text_of(token_id)
        piece = vocabulary.bytes_of(token_id) if "\ufffd" in text else text.encode()
        return {"token": text, "logprob": logprob, "bytes": list(piece)}
