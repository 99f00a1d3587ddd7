"""Chat: the engine's outputs in the words of the API."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from curkv.engine.types import Output, TokenLogprob
from curkv.models.vocabulary import Vocabulary
from curkv.server.chat.conversation import Conversation
from curkv.server.chat.protocol import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatLogprob,
    ChatLogprobs,
    ChatMessage,
    ChatResponse,
    Delta,
    FinishReason,
    TopLogprob,
)
from curkv.server.generation import ChunkedAnswer
from curkv.server.logprobs import PromptLogprobs, prompt_logprobs
from curkv.server.protocol import Usage


class ChatAnswer(ChunkedAnswer):
    """Answer to POST /v1/chat/completions."""

    def __init__(self, conversation: Conversation):
        generation, body = conversation.generation, conversation.body
        super().__init__(generation)
        self._body = body
        self._tools = conversation.tools
        self._spoken = [conversation.spoken() for _ in range(generation.num_choices)]
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
        self._prompt_logprobs: PromptLogprobs | None = None

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
        if begun:
            return self._chunk([piece])
        told = self._told(output)
        return self._chunk([piece], prompt_token_ids=self._prompt_token_ids, prompt_logprobs=told)

    def add(self, choice: int, output: Output) -> None:
        """Adds an output to its choice."""
        whole, spoken = self._choices[choice], self._spoken[choice]
        self._prompt_logprobs = self._prompt_logprobs or self._told(output)
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

    def whole(self) -> ChatResponse:
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
            usage=self.usage,
            prompt_token_ids=self._prompt_token_ids,
            prompt_logprobs=self._prompt_logprobs,
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

    def _told(self, output: Output) -> PromptLogprobs | None:
        vocabulary = self.generation.client.vocabulary
        return prompt_logprobs(output.prompt_logprobs, self._body.prompt_logprobs, vocabulary)

    def _logprobs(self, output: Output) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        return ChatLogprobs(content=worded_logprobs(self.generation.client.vocabulary, output.logprobs or ()))


def worded_logprobs(vocabulary: Vocabulary, entries: Iterable[TokenLogprob]) -> list[ChatLogprob]:
    """Log-probabilities of tokens in the words of the API."""

    def token(token_id: int, logprob: float) -> dict[str, Any]:
        text = vocabulary.text_of(token_id)
        piece = vocabulary.bytes_of(token_id) if "\ufffd" in text else text.encode()
        return {"token": text, "logprob": logprob, "bytes": list(piece)}

    def top(entry: TokenLogprob) -> list[TopLogprob]:
        return [TopLogprob(**token(*alternative)) for alternative in entry.top]

    return [ChatLogprob(**token(e.token_id, e.logprob), top_logprobs=top(e)) for e in entries]
