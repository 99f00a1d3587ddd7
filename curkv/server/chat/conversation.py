"""A conversation in: its tokens, its tools, and what of them is the engine's; all chat endpoints share it."""

from __future__ import annotations

import re
import uuid
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.requests import Request as HTTPRequest

from curkv.engine.types import InvalidRequest, SamplingParams
from curkv.server.chat.protocol import PART_SEPARATOR, ChatRequest, Message, Rendering, context_ttl
from curkv.server.chat.tools import Spoken, ToolUse, readable_arguments
from curkv.server.generation import Generation, Prompt, prepare
from curkv.server.state import ServerState
from curkv.server.tokenizing import Reader

if TYPE_CHECKING:
    from curkv.engine.client import EngineClient
    from curkv.models.chat_template import ChatTemplate

_MARK = "\ue000"
"""A private-use character that stands at a place in a message while its place in the text is looked for."""
_SEAMS = [chr(code) for code in range(0xE001, 0xE100)]
"""Private-use characters, of which one that occurs nowhere breaks what would be read as special tokens."""
_STRANGERS = ("user", "tool", "function")
"""Roles of messages whose text may be anybody's."""


def tokenize(
    messages: Sequence[Message], rendering: Rendering, client: EngineClient, reader: Reader
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
    special = None if rendering.reads_special_tokens else client.vocabulary.special_texts
    page = _Page(messages, rendering, template, special)
    try:
        text = page.text()
        ids, ends = reader.tokens_with_ends(text, "messages", rendering.special_tokens, page.seam)
        context_end, frame_end = page.context_end(text), page.frame_end(text)
    except InvalidRequest:
        raise
    except ValueError as error:
        raise InvalidRequest(str(error), "messages") from error
    context, frame = (bisect_right(ends, end) if end else 0 for end in (context_end, frame_end))
    plain = text.replace(page.seam, "") if page.seam is not None else text
    return [Prompt(ids, plain, context or None, context_ttl(messages), frame)]


class _Page:
    """A conversation that is written out, more than once to find places in it.

    Attributes:
        seam: a character that stands in what would be read as a special token; None: nothing would be.
    """

    def __init__(
        self,
        messages: Sequence[Message],
        rendering: Rendering,
        template: ChatTemplate,
        special: re.Pattern[str] | None,
    ):
        self._messages = messages
        self._rendering = rendering
        self._template = template
        self._special = special
        self.seam = self._free_seam()

    def text(self) -> str:
        """The text, to the end of the last message's content if that is to be continued."""
        text = self._render(None)
        if not self._rendering.continues:
            return text
        last = len(self._messages) - 1
        return text[: self._place(text, (last, max(0, len(self._messages[last].parts) - 1)))]

    def context_end(self, text: str) -> int:
        """Characters of the text up to the last part marked as the context's end; 0: none is."""
        marks = [
            (i, j) for i, m in enumerate(self._messages) for j, (_, marked) in enumerate(m.parts) if marked
        ]
        return self._place(text, marks[-1]) if marks else 0

    def frame_end(self, text: str) -> int:
        """Characters of the text before anything that the client says."""
        roles = [message.role for message in self._messages]
        return self._template.frame(text, roles, self._rendering.variables)

    def _place(self, text: str, part: tuple[int, int]) -> int:
        """Characters of the text up to the end of part `part[1]` of message `part[0]`.

        With something inserted there, the text is the same exactly up to there, whatever the template does.
        """
        marked = self._render(part)
        return next((i for i, (a, b) in enumerate(zip(text, marked, strict=False)) if a != b), len(text))

    def _render(self, mark: tuple[int, int] | None) -> str:
        r = self._rendering
        plain = [self._plain(i, message, mark) for i, message in enumerate(self._messages)]
        return self._template.render(plain, r.variables, r.tools, r.documents, r.generation_prompt)

    def _free_seam(self) -> str | None:
        strange = [text for m in self._messages if m.role in _STRANGERS for text, _ in m.parts]
        if self._special is None or not any(self._special.search(text) for text in strange):
            return None
        texts = [text for m in self._messages for text, _ in m.parts]
        seam = next((seam for seam in _SEAMS if not any(seam in text for text in texts)), None)
        if seam is None:
            raise InvalidRequest("has special tokens beside all private-use characters", "messages")
        return seam

    def _broken(self, found: re.Match[str]) -> str:
        return f"{found[0][0]}{self.seam}{found[0][1:]}"

    def _plain(self, index: int, message: Message, mark: tuple[int, int] | None) -> dict[str, Any]:
        """A message in the form of templates; with a mark behind part `mark[1]` of message `mark[0]`."""
        parts = [text for text, _ in message.parts]
        if self.seam is not None and self._special is not None and message.role in _STRANGERS:
            parts = [self._special.sub(self._broken, text) for text in parts]
        texts = [text + _MARK * ((index, j) == mark) for j, text in enumerate(parts)]
        return _plain_message(message, PART_SEPARATOR.join(texts))


def _plain_message(message: Message, content: str) -> dict[str, Any]:
    """A message in the form of templates."""
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
    return {"role": role, "content": content, **given}


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
    skip = sampling.skip_special_tokens and not special
    return replace(sampling, structure=structure, skip_special_tokens=skip)


@dataclass(frozen=True)
class Conversation:
    """A conversation that was found servable.

    Attributes:
        body: what was asked, in the words of OpenAI's API.
        tools: what may be called.
        generation: what the engine is asked.
    """

    body: ChatRequest
    tools: ToolUse
    generation: Generation

    def spoken(self) -> Spoken:
        """Reads one choice's answer."""
        template, prompt = self.generation.client.chat_template, self.generation.prompt_of(0).text or ""
        return Spoken(self.tools.parser(template, prompt) if template is not None else None, call_id)


async def converse(
    body: ChatRequest,
    http: HTTPRequest,
    state: ServerState,
    prefix: str,
    prompts: Callable[[EngineClient, Reader], list[Prompt]] | None = None,
) -> Conversation:
    """Makes sure that a conversation can be continued; see `prepare`.

    Args:
        body: the conversation.
        http: for its headers.
        state: the server's.
        prefix: of the answer's id.
        prompts: makes the prompt; None: the chat template does.

    Raises:
        APIError: another model was asked for, the server takes no requests, or the queue is full.
        InvalidRequest: a field or header has a bad value.
    """
    tools = body.tool_use
    prompts = prompts or partial(tokenize, body.messages, body.rendering(tools))
    generation = await prepare(body, partial(_sampling, body, tools), 1, prompts, http, state, prefix)
    return Conversation(body, tools, generation)


def _sampling(body: ChatRequest, tools: ToolUse, client: EngineClient) -> SamplingParams:
    sampling = body.sampling(body.wanted_tokens, body.wanted_logprobs, client.vocabulary)
    return with_tools(sampling, tools, client)


def call_id() -> str:
    """Nine letters and digits, which is what Mistral's templates insist on."""
    return uuid.uuid4().hex[:9]
