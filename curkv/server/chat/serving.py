"""Chat: a conversation in, and the engine's outputs in the words of the API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from curkv.engine.types import InvalidRequest, Output, TokenLogprob
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
    Message,
    TopLogprob,
)
from curkv.server.generation import Answer, Generation, Prompt
from curkv.server.protocol import FinishReason, Usage

if TYPE_CHECKING:
    from curkv.engine.client import EngineClient
    from curkv.models.chat_template import ChatTemplate

_MARK = "\ue000"
"""A private-use character that stands at the context's end while its place in the text is looked for."""


def tokenize(messages: Sequence[Message], variables: Mapping[str, Any], client: EngineClient) -> list[Prompt]:
    """The conversation as the model reads it, in tokens.

    Raises:
        InvalidRequest: the model has no chat template, or it does not take this conversation.
    """
    template = client.chat_template
    if template is None:
        raise InvalidRequest("the model has no chat template; use /v1/completions", "messages")
    try:
        text = template.render(_plain(messages), variables)
        end = _context_end(text, messages, variables, template)
    except ValueError as error:
        raise InvalidRequest(str(error), "messages") from error
    encoding = client.tokenizer.encode(text, add_special_tokens=False)
    context = sum(1 for _, token_end in encoding.offsets if token_end <= end)
    return [Prompt(encoding.ids, text, context or None)]


def _plain(messages: Sequence[Message], marked: tuple[int, int] | None = None) -> list[dict[str, Any]]:
    """Messages in the form of templates; with a mark behind part `marked[1]` of message `marked[0]`."""
    plain = []
    for i, message in enumerate(messages):
        texts = [text + _MARK * ((i, j) == marked) for j, (text, _) in enumerate(message.parts)]
        name = {"name": message.name} if message.name is not None else {}
        plain.append({"role": message.role, "content": PART_SEPARATOR.join(texts), **name})
    return plain


def _context_end(
    text: str, messages: Sequence[Message], variables: Mapping[str, Any], template: ChatTemplate
) -> int:
    """Characters of the rendered conversation up to the last part marked as the context's end; 0: none is.

    With something inserted at the mark, the text is the same exactly up to there, whatever the template does.
    """
    marks = [(i, j) for i, m in enumerate(messages) for j, (_, marked) in enumerate(m.parts) if marked]
    if not marks:
        return 0
    marked = template.render(_plain(messages, marks[-1]), variables)
    return next((i for i, (a, b) in enumerate(zip(text, marked, strict=False)) if a != b), len(text))


class ChatAnswer(Answer):
    """Answer to POST /v1/chat/completions."""

    def __init__(self, generation: Generation, body: ChatRequest):
        super().__init__(generation)
        self._body = body
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
        piece = ChatChunkChoice(
            index=choice,
            delta=Delta(
                role=None if begun else "assistant", content=output.text if output.text or not begun else None
            ),
            logprobs=self._logprobs(output),
            finish_reason=cast("FinishReason | None", output.finish_reason),
            stop_reason=output.stop_reason,
            token_ids=output.token_ids if self._body.return_token_ids else None,
        )
        if begun and not (output.text or piece.finish_reason or piece.token_ids or piece.logprobs):
            return None
        return self._chunk([piece], prompt_token_ids=None if begun else self._prompt_token_ids)

    def add(self, choice: int, output: Output) -> None:
        """Adds an output to its choice."""
        whole = self._choices[choice]
        whole.message.content += output.text
        whole.finish_reason = cast("FinishReason | None", output.finish_reason)
        whole.stop_reason = output.stop_reason
        if whole.token_ids is not None:
            whole.token_ids += output.token_ids
        if whole.logprobs is not None and (more := self._logprobs(output)) is not None:
            whole.logprobs.content += more.content

    def whole(self, usage: Usage) -> ChatResponse:
        """All choices."""
        g = self.generation
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
        text = self.generation.token_text(token_id)
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}
