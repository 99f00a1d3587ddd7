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
from curkv.server.generation import ChunkedAnswer, Generation, Prompt
from curkv.server.logprobs import prompt_logprobs
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
    special = body.add_special_tokens is not False
    prompts = []
    for prompt in body.prompts:
        if isinstance(prompt, str):
            ids = reader.tokens(prompt, "prompt", special)
            prompts.append(Prompt(ids, None if reader.cut else prompt))
        else:
            prompts.append(Prompt(reader.count(prompt)))
    return prompts


def sampling(body: CompletionRequest, client: EngineClient) -> SamplingParams:
    """How the engine is to continue each prompt."""
    most = body.predicted.get("max_tokens", body.max_tokens)
    params = body.sampling(most, body.logprobs, client.vocabulary)
    if not body.echo or body.logprobs is None:
        return params
    return replace(params, prompt_logprobs=max(body.logprobs, body.prompt_logprobs or 0))


class CompletionAnswer(ChunkedAnswer):
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

    def whole(self) -> CompletionResponse:
        """All choices."""
        return self._response(self._choices, self.usage)

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
            prompt_logprobs=prompt_logprobs(output.prompt_logprobs, body.prompt_logprobs, self._vocabulary),
        )

    def _prompt_text(self, prompt: Prompt) -> str:
        if prompt.text is not None:
            return prompt.text
        return self._vocabulary.decode(prompt.token_ids)

    def _logprobs(self, choice: int, output: Output) -> Logprobs:
        answer = Logprobs(top_logprobs=[] if self._body.logprobs else None)
        echoed = output.prompt_logprobs if self._body.echo else None
        if echoed is not None:
            self._append(answer, choice, self.generation.prompt_of(choice).token_ids[0], None)
        for entry in (*(echoed or ()), *(output.logprobs or ())):
            self._append(answer, choice, entry.token_id, entry)
        return answer

    def _append(self, answer: Logprobs, choice: int, token_id: int, entry: TokenLogprob | None) -> None:
        token = self._vocabulary.text_of(token_id)
        answer.tokens.append(token)
        answer.token_logprobs.append(entry.logprob if entry else None)
        answer.text_offset.append(self._text[choice].add(self._vocabulary.bytes_of(token_id)))
        if answer.top_logprobs is not None:
            answer.top_logprobs.append(self._top(entry) if entry else None)

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """The likeliest tokens and, in any case, the one that is there; of two with one text both."""
        shown = dict(entry.top[: self._body.logprobs])
        shown.setdefault(entry.token_id, entry.logprob)
        top: dict[str, float] = {}
        for i, logprob in shown.items():
            text = self._vocabulary.text_of(i)
            top[text if text not in top else f"token_id:{i}"] = logprob
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
