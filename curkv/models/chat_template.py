"""Conversations as the text that a model was trained to continue."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

Message = Mapping[str, Any]

_ARGUMENTS = frozenset(inspect.signature(PreTrainedTokenizerFast.apply_chat_template).parameters)


class ChatTemplate:
    """A model's Jinja template, rendered by transformers in a sandbox.

    Args:
        tokenizer: holds the template and the special tokens that it names.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self._tokenizer = tokenizer

    def render(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
        """Returns the conversation's text up to where the assistant's next message begins.

        Args:
            messages: with `role`, `content` as a string, and whatever else the template reads.
            variables: further variables of the template, such as `enable_thinking`.

        Raises:
            ValueError: the template does not take such messages or variables.
        """
        taken = sorted(_ARGUMENTS & set(variables))
        if taken:
            raise ValueError(f"{taken[0]!r} is no variable of a chat template")
        try:
            text: Any = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=True,
                **variables,
            )
        except Exception as error:  # a template may do anything with what it is given
            raise ValueError(f"the model's chat template refuses the conversation: {error}") from error
        return str(text)


def load_chat_template(directory: Path) -> ChatTemplate | None:
    """Returns the template of a model directory, None if it has none (a base model)."""
    log = logging.getLogger("transformers.tokenization_utils_base")
    level = log.level
    log.setLevel(logging.ERROR)  # that the directory names another class does not matter to a template
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    finally:
        log.setLevel(level)
    return ChatTemplate(tokenizer) if tokenizer.chat_template else None
