"""Real text that every Python installation has, cut to a wanted number of tokens."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def documentation_text() -> str:
    """CPython's language reference as installed with it (pydoc_data.topics), some 700,000 characters."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def token_spans(tokenizer: Tokenizer, count: int, length: int, seed: int) -> list[list[int]]:
    """Cuts `count` different spans of `length` tokens out of the documentation.

    Args:
        tokenizer: of the model.
        count: spans.
        length: tokens of each.
        seed: chooses where they begin.

    Returns:
        Token ids.
    """
    text, draw = documentation_text(), random.Random(seed)
    window = 12 * length + 200
    spans: list[list[int]] = []
    while len(spans) < count:
        start = draw.randrange(max(1, len(text) - window))
        ids: list[int] = tokenizer.encode(text[start : start + window], add_special_tokens=False).ids
        if len(ids) >= length:
            spans.append(ids[:length])
    return spans
