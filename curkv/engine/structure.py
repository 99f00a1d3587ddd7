"""Output that follows a grammar: llguidance says which tokens may come next.

llguidance and not xgrammar: a matcher is ready in about a millisecond because no table over the vocabulary is
compiled per schema, keywords that it cannot follow are refused, and it brings no further package.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import cache, cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from torch import Tensor

from curkv.cache.upload import upload, upload_list
from curkv.engine.grammars import compile_grammar, grammar_tokenizer, source_text
from curkv.engine.types import InvalidRequest, Structure

if TYPE_CHECKING:
    from tokenizers import Tokenizer

logger = logging.getLogger(__name__)

MAX_HELD = 2_000_000
"""Characters of the structures whose compiled forms are held; a form takes up to some 500 bytes for each."""

_BITS = 32


class Structures:
    """Makes matchers over a model's vocabulary, and holds those made last: each content is compiled once.

    Args:
        tokenizer: the model's tokenizer.
        vocab_size: rows of the model's head, which may exceed the tokenizer's vocabulary.
        eos_ids: tokens that may end an output once its structure is complete.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]):
        self._source = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = list(eos_ids)
        self._held: OrderedDict[tuple[str, str], LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def vocabulary(self) -> tuple[str, int, list[int]]:
        """Arguments of `grammar_tokenizer`, for another process that is to compile the same."""
        return self._source.to_str(), self._vocab_size, self._eos_ids

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        return grammar_tokenizer(*self.vocabulary)

    def warm_up(self) -> None:
        """Makes what all structures need, which takes 0.4 s, in half of which nobody else may run.

        A tokenizer that llguidance cannot read is no reason not to serve: structured requests are refused.
        """
        try:
            assert self._tokenizer
        except ValueError as error:
            logger.warning("no structured output, no tools: llguidance cannot read the tokenizer: %s", error)

    @staticmethod
    def key(structure: Structure) -> tuple[str, str]:
        """Kind and text of a structure: what is equal is compiled once."""
        return structure.kind, source_text(structure.source)

    def holds(self, structure: Structure) -> bool:
        """Whether a structure's matcher is there already."""
        return self.key(structure) in self._held

    def matcher(self, structure: Structure) -> LLMatcher:
        """Returns a matcher at the start of an output, to be copied; compiles it unless it is held.

        Raises:
            InvalidRequest: the schema or expression is wrong, or uses what cannot be followed.
        """
        key = self.key(structure)
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        try:
            matcher = compile_grammar(self._tokenizer, structure.kind, key[1])
        except ValueError as error:
            raise InvalidRequest(str(error), structure.param) from error
        with self._lock:
            self._held[key] = matcher
            while len(self._held) > 1 and sum(len(source) for _, source in self._held) > MAX_HELD:
                self._held.popitem(last=False)
        return matcher


def rule_out(logits: Tensor, matchers: Sequence[LLMatcher | None]) -> None:
    """Sets the logits of tokens that may not come next to -inf, in place and for all rows at once.

    Args:
        logits: float32 [R, vocab].
        matchers: of each row; None leaves it alone.
    """
    rows = [(row, matcher) for row, matcher in enumerate(matchers) if matcher is not None]
    if not rows:
        return
    device = logits.device
    words = np.empty((len(rows), -(-logits.shape[1] // _BITS)), dtype=np.int32)
    places = [(matcher, place) for place, (_, matcher) in enumerate(rows)]
    _executor().unsafe_compute_mask_ptr(places, words.ctypes.data, words.shape[1] * 4, len(rows))
    shifts = torch.arange(_BITS, dtype=torch.int32, device=device)
    allowed = upload(torch.from_numpy(words), device)[:, :, None] >> shifts & 1
    allowed = allowed.bool().flatten(1)[:, : logits.shape[1]]
    chosen = upload_list((row for row, _ in rows), device)
    logits[chosen] = logits[chosen].masked_fill_(~allowed, -torch.inf)


@cache
def _executor() -> LLExecutor:
    """Threads that fill the rows of a mask side by side."""
    return LLExecutor()
