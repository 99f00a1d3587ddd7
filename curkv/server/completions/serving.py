"""Completions: prompts in, and the engine's outputs in the words of the API."""

from __future__ import annotations

import codecs
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from curkv.engine.types import Output, SamplingParams, TokenLogprob
from curkv.server.completions.protocol import (
    CompletionChoice,
    CompletionRequest,
    CompletionResponse,
    Logprobs,
)
from curkv.server.generation import Answer, Generation, Prompt
from curkv.server.protocol import FinishReason, Usage
from curkv.server.tokenizing import Reader

if TYPE_CHECKING:
    from curkv.engine.client import EngineClient


def tokenize(body: CompletionRequest, client: EngineClient, reader: Reader) -> list[Prompt]:
    """The prompts in tokens; texts get the special tokens that the tokenizer begins a text with.

    Raises:
        InvalidRequest: one cannot fit into the context.
        APIError: 429, the queue has no room for so many tokens.
    """
    return [
        Prompt(reader.tokens(prompt, "prompt"), prompt)
        if isinstance(prompt, str)
        else Prompt(reader.count(prompt))
        for prompt in body.prompts
    ]


def sampling(body: CompletionRequest) -> SamplingParams:
    """How the engine is to continue each prompt."""
    params = body.sampling(body.max_tokens, body.logprobs)
    return replace(params, prompt_logprobs=body.logprobs if body.echo else None)


class CompletionAnswer(Answer):
    """Answer to POST /v1/completions."""

    def __init__(self, generation: Generation, body: CompletionRequest):
        super().__init__(generation)
        self._body = body
        self._choices = [CompletionChoice(index=index, text="") for index in range(generation.num_choices)]
        self._begun = [False] * generation.num_choices
        self._text = [_Offsets() for _ in range(generation.num_choices)]
        self._vocabulary = generation.client.vocabulary

    def chunk(self, choice: int, output: Output) -> CompletionResponse | None:
        """A chunk with one piece of one choice."""
        piece = self._piece(choice, output)
        return self._response([piece]) if piece.has_news else None

    def add(self, choice: int, output: Output) -> None:
        """Adds a piece to its choice."""
        self._choices[choice].extend(self._piece(choice, output))

    def whole(self, usage: Usage) -> CompletionResponse:
        """All choices."""
        return self._response(self._choices, usage)

    def usage_chunk(self, usage: Usage) -> CompletionResponse:
        """A chunk without choices."""
        return self._response([], usage)

    def _response(self, choices: list[CompletionChoice], usage: Usage | None = None) -> CompletionResponse:
        g = self.generation
        return CompletionResponse(id=g.id, created=g.created, model=g.model, choices=choices, usage=usage)

    def _piece(self, choice: int, output: Output) -> CompletionChoice:
        body, first = self._body, not self._begun[choice]
        self._begun[choice] = True
        prompt = self.generation.prompt_of(choice)
        return CompletionChoice(
            index=choice,
            text=self._prompt_text(prompt) + output.text if first and body.echo else output.text,
            logprobs=self._logprobs(choice, output) if body.logprobs is not None else None,
            finish_reason=cast("FinishReason | None", output.finish_reason),
            stop_reason=output.stop_reason,
            token_ids=output.token_ids if body.return_token_ids else None,
            prompt_token_ids=prompt.token_ids if first and body.return_token_ids else None,
        )

    def _prompt_text(self, prompt: Prompt) -> str:
        if prompt.text is not None:
            return prompt.text
        return self._vocabulary.decode(prompt.token_ids)

    def _logprobs(self, choice: int, output: Output) -> Logprobs:
        answer = Logprobs(top_logprobs=[] if self._body.logprobs else None)
        if output.prompt_logprobs is not None:
            self._append(answer, choice, self.generation.prompt_of(choice).token_ids[0], None)
        for entry in (*(output.prompt_logprobs or ()), *(output.logprobs or ())):
            self._append(answer, choice, entry.token_id, entry)
        return answer

    def _append(self, answer: Logprobs, choice: int, token_id: int, entry: TokenLogprob | None) -> None:
        token = self._vocabulary.text_of(token_id)
        answer.tokens.append(token)
        answer.token_logprobs.append(entry.logprob if entry else None)
        answer.text_offset.append(self._text[choice].add(self._vocabulary.bytes_of(token_id)))
        if answer.top_logprobs is not None:
            answer.top_logprobs.append(self._top(token, entry) if entry else None)

    def _top(self, token: str, entry: TokenLogprob) -> dict[str, float]:
        """The likeliest tokens and, in any case, the one that is there; of two with one text the likelier."""
        top = {self._vocabulary.text_of(i): logprob for i, logprob in reversed(entry.top)}
        top.setdefault(token, entry.logprob)
        return top


class _Offsets:
    """Where tokens begin in the text that their bytes make."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._characters = 0

    def add(self, piece: bytes) -> int:
        """Adds a token; returns how many characters end before it."""
        before = self._characters
        self._characters += len(self._decoder.decode(piece))
        return before
