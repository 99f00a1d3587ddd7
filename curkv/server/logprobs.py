"""Log-probabilities of prompts in the words of vLLM's API."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel

from curkv.engine.types import TokenLogprob
from curkv.models.vocabulary import Vocabulary


class PromptLogprob(BaseModel):
    """A token at a place of the prompt.

    Attributes:
        logprob: natural logarithm of its probability.
        rank: 1 for the likeliest; null for the prompt's own token if it is none of those reported.
        decoded_token: its text.
    """

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[int, PromptLogprob] | None]
"""Per token of the prompt, by token id: its own and the likeliest ones; null for the first."""


def prompt_logprobs(
    entries: Sequence[TokenLogprob] | None, count: int | None, vocabulary: Vocabulary
) -> PromptLogprobs | None:
    """Words what an output tells of its prompt.

    Args:
        entries: of the prompt's tokens from the second one on; None: nothing is told.
        count: how many of the likeliest to report; None: nothing was asked for.
        vocabulary: for the tokens' texts.
    """
    if entries is None or count is None:
        return None
    return [None, *(_places(entry, count, vocabulary) for entry in entries)]


def _places(entry: TokenLogprob, count: int, vocabulary: Vocabulary) -> dict[int, PromptLogprob]:
    likeliest = {token: (logprob, rank) for rank, (token, logprob) in enumerate(entry.top[:count], 1)}
    own = {entry.token_id: likeliest.get(entry.token_id, (entry.logprob, None))}
    return {
        token: PromptLogprob(logprob=logprob, rank=rank, decoded_token=vocabulary.text_of(token))
        for token, (logprob, rank) in (own | likeliest).items()
    }
