"""Texts become tokens here, for all endpoints: what cannot fit is refused before it costs anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

from curkv.engine.types import CONTEXT_EXCEEDED, InvalidRequest
from curkv.server.queue import Place

if TYPE_CHECKING:
    from curkv.engine.client import EngineClient


class Reader:
    """Tokenizes the texts of one request; to be used in a worker.

    Args:
        client: for its vocabulary and the length of its context.
        place: what the request takes of the queue; None: it does not come there.
        keep: most last tokens of a prompt that are read; None: all of them.

    Attributes:
        cut: whether tokens of the last prompt were left out.
    """

    def __init__(self, client: EngineClient, place: Place | None = None, keep: int | None = None):
        self._vocabulary = client.vocabulary
        self._most = client.max_model_len
        self._place = place
        self._keep = keep
        self._tokens = 0
        self.cut = False

    def tokens(self, text: str, param: str, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text.

        Raises:
            InvalidRequest: it cannot fit into the context.
            APIError: 429, the queue has no room for so many tokens.
        """
        self._check(text, param)
        return self.count(self._vocabulary.encode(text, add_special_tokens))

    def tokens_with_ends(
        self, text: str, param: str, add_special_tokens: bool = False, seam: str | None = None
    ) -> tuple[list[int], list[int]]:
        """The tokens of a text, and in which character each ends.

        Args:
            text: the text.
            param: the field that it is of.
            add_special_tokens: whether it gets those that the tokenizer begins a text with.
            seam: a character that is not read, and that no token spans.

        Raises:
            InvalidRequest: it cannot fit into the context.
            APIError: 429, the queue has no room for so many tokens.
        """
        self._check(text, param)
        ids, ends = self._vocabulary.encode_with_ends(text, add_special_tokens, seam)
        kept = self.count(ids)
        return kept, ends[len(ids) - len(kept) :]

    def count(self, token_ids: list[int]) -> list[int]:
        """Counts tokens that came as such, and returns those that are read.

        Raises:
            APIError: 429, the queue has no room for so many tokens.
        """
        self.cut = self._keep is not None and len(token_ids) > self._keep
        if self.cut:
            token_ids = token_ids[len(token_ids) - (self._keep or 0) :]
        self._tokens += len(token_ids)
        if self._place is not None:
            self._place.hold_tokens(self._tokens)
        return token_ids

    def _check(self, text: str, param: str) -> None:
        least = self._vocabulary.least_tokens(text)
        if least > self._most and self._keep is None:
            message = f"the text has at least {least} tokens, the context {self._most}"
            raise InvalidRequest(message, param, CONTEXT_EXCEEDED)
