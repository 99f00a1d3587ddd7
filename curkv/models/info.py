"""What belongs to a model beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from curkv.models.chat_template import ChatTemplate


@dataclass(frozen=True)
class ModelInfo:
    """What belongs to a model beside its weights.

    Attributes:
        tokenizer: turns text into token ids and back.
        chat_template: writes out conversations for the model; None if it is no model for chat.
        pruning: how the model was pruned, see `load_pruning`; None if it was not.
    """

    tokenizer: Tokenizer
    chat_template: ChatTemplate | None = None
    pruning: Mapping[str, Any] | None = None
