"""Output that follows a grammar: llguidance says which tokens may come next.

llguidance and not xgrammar: a matcher is ready in about a millisecond because no table over the vocabulary is
compiled per schema, keywords that it cannot follow are refused, and it brings no further package.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache, cached_property
from typing import TYPE_CHECKING, Literal

import torch
from llguidance import LLExecutor, LLMatcher, LLTokenizer, grammar_from
from torch import Tensor

from curkv.engine.types import InvalidRequest, Structure

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_FORMATS: dict[str, Literal["json_schema", "regex", "choice", "lark"]] = {
    "json": "json_schema",
    "regex": "regex",
    "choice": "choice",
    "lark": "lark",
}
_BITS = 32
_SHIFTS = torch.arange(_BITS, dtype=torch.int32)


class Structures:
    """Makes matchers over a model's vocabulary.

    Args:
        tokenizer: the model's tokenizer.
        vocab_size: rows of the model's head, which may exceed the tokenizer's vocabulary.
        eos_ids: tokens that may end an output once its structure is complete.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]):
        self._source = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = list(eos_ids)

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        """Takes about half a second, so it waits for the first structured request."""
        return LLTokenizer(self._source.to_str(), n_vocab=self._vocab_size, eos_token=self._eos_ids or None)

    def matcher(self, structure: Structure) -> LLMatcher:
        """Returns a matcher at the start of an output.

        Raises:
            InvalidRequest: the schema or expression is wrong, or uses what cannot be followed.
        """
        source = structure.source if isinstance(structure.source, str) else json.dumps(structure.source)
        try:
            matcher = LLMatcher(self._tokenizer, grammar_from(_FORMATS[structure.kind], source), log_level=0)
        except ValueError as error:
            raise InvalidRequest(str(error), structure.param) from error
        if matcher.is_error():
            raise InvalidRequest(matcher.get_error(), structure.param)
        return matcher


def rule_out(logits: Tensor, matchers: Sequence[LLMatcher | None]) -> None:
    """Sets the logits of tokens that may not come next to -inf, in place and for all rows at once.

    Args:
        logits: float32 [R, vocab] on the CPU.
        matchers: of each row; None leaves it alone.
    """
    rows = [(row, matcher) for row, matcher in enumerate(matchers) if matcher is not None]
    if not rows:
        return
    words = torch.empty(len(rows), -(-logits.shape[1] // _BITS), dtype=torch.int32)
    places = [(matcher, place) for place, (_, matcher) in enumerate(rows)]
    _executor().unsafe_compute_mask_ptr(places, words.data_ptr(), words.shape[1] * 4, len(rows))
    allowed = (words[:, :, None] >> _SHIFTS & 1).bool().flatten(1)[:, : logits.shape[1]]
    chosen = [row for row, _ in rows]
    logits[chosen] = logits[chosen].masked_fill_(~allowed, -torch.inf)


@cache
def _executor() -> LLExecutor:
    """Threads that fill the rows of a mask side by side."""
    return LLExecutor()
