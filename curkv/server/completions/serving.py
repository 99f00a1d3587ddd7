"""Completions: prompts in, and the engine's outputs in the words of the API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from curkv.engine.types import Output, TokenLogprob
from curkv.server.completions.protocol import (
    CompletionChoice,
    CompletionRequest,
    CompletionResponse,
    Logprobs,
)
from curkv.server.generation import Answer, Generation, Prompt
from curkv.server.protocol import FinishReason, Usage

if TYPE_CHECKING:
    from curkv.engine.client import EngineClient


def tokenize(body: CompletionRequest, client: EngineClient) -> list[Prompt]:
    """The prompts in tokens; texts get the special tokens that the tokenizer begins a text with."""
    return [Prompt(client.tokenizer.encode(p).ids if isinstance(p, str) else p) for p in body.prompts]


class CompletionAnswer(Answer):
    """Answer to POST /v1/completions."""

    def __init__(self, generation: Generation, body: CompletionRequest):
        super().__init__(generation)
        self._body = body
        self._choices = [CompletionChoice(index=index, text="") for index in range(generation.num_choices)]
        self._begun = [False] * generation.num_choices
        self._num_characters = [0] * generation.num_choices

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
        body, begun = self._body, self._begun[choice]
        self._begun[choice] = True
        with_prompt = body.return_token_ids and not begun
        return CompletionChoice(
            index=choice,
            text=output.text,
            logprobs=self._logprobs(choice, output.logprobs or ()) if body.logprobs is not None else None,
            finish_reason=cast("FinishReason | None", output.finish_reason),
            stop_reason=output.stop_reason,
            token_ids=output.token_ids if body.return_token_ids else None,
            prompt_token_ids=self.generation.prompt_of(choice) if with_prompt else None,
        )

    def _logprobs(self, choice: int, entries: Sequence[TokenLogprob]) -> Logprobs:
        text_of = self.generation.token_text
        answer = Logprobs(top_logprobs=[] if self._body.logprobs else None)
        for entry in entries:
            token = text_of(entry.token_id)
            answer.tokens.append(token)
            answer.token_logprobs.append(entry.logprob)
            answer.text_offset.append(self._num_characters[choice])
            self._num_characters[choice] += len(token)
            if answer.top_logprobs is not None:
                answer.top_logprobs.append({text_of(i): logprob for i, logprob in reversed(entry.top)})
        return answer
