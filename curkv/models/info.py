"""What belongs to a model beside its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from curkv.models.chat_template import ChatTemplate
from curkv.models.vocabulary import Vocabulary


@dataclass(frozen=True)
class ModelInfo:
    """What belongs to a model beside its weights.

    Attributes:
        tokenizer: turns text into token ids and back.
        chat_template: writes out conversations for the model; None if it is no model for chat.
        pruning: how the model was pruned, see `load_pruning`; None if it was not.
        eos_token: text of the token that the tokenizer says ends a text.
    """

    tokenizer: Tokenizer
    chat_template: ChatTemplate | None = None
    pruning: Mapping[str, Any] | None = None
    eos_token: str | None = None

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokenizer's tokens."""
        return Vocabulary(self.tokenizer)

    def end_ids(self, configured: Sequence[int], vocab_size: int) -> list[int]:
        """Tokens that end an answer: those of the configuration and the tokenizer's, as in vLLM.

        Args:
            configured: ids of the model's configuration; what is beyond the vocabulary is no token.
            vocab_size: rows of the model's head.
        """
        own = self.tokenizer.token_to_id(self.eos_token) if self.eos_token is not None else None
        found = dict.fromkeys([*configured, *([own] if own is not None else [])])
        return [token for token in found if 0 <= token < vocab_size]

    def num_token_ids(self, rows: int) -> int:
        """Returns how many ids both the tokenizer and an embedding of so many rows have: those below."""
        while rows and self.tokenizer.id_to_token(rows - 1) is None:  # rows that only fill up a multiple
            rows -= 1
        return rows
