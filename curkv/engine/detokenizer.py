"""Text of a growing token sequence, with stop strings cut off."""

from __future__ import annotations

import codecs
from typing import Protocol

from tokenizers.decoders import DecodeStream

from curkv.models.vocabulary import Vocabulary

CONTEXT_TOKENS = 8
_UNKNOWN = "\ufffd"


class Detokenizer:
    """Incremental detokenisation of one sequence.

    Text that may turn out to be the start of a stop string is held back until it cannot be one any more.

    Args:
        vocabulary: the model's.
        prompt: the prompt's token ids; the last few let word-start markers decode as in running text, and a
            character that they begin is completed by the first tokens of the sequence.
        stop: strings that end the sequence; unless told, none of them appears in the text.
        skip_special_tokens: special tokens have no text.
        include_stop: the string that ended the sequence is part of its text.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        prompt: list[int],
        stop: tuple[str, ...] = (),
        skip_special_tokens: bool = True,
        include_stop: bool = False,
    ):
        kind = _Bytes if vocabulary.bytewise else _Tokens
        self._stream: _Stream = kind(vocabulary, prompt[-CONTEXT_TOKENS:], skip_special_tokens)
        self._watches = [_Watch(text) for text in stop]
        self._include_stop = include_stop
        self._held = ""

    def append(self, token_id: int, watch: bool = True) -> tuple[str, str | None]:
        """Adds a token; stop strings count only if `watch`.

        Returns:
            The text that is now certain, and the stop string that was met, if one was.
        """
        new = self._stream.step(token_id)
        text = self._held + new
        if not watch:
            self._held = ""
            return text, None
        found = [(len(self._held) + end - len(w.stop), w.stop) for w in self._watches if (end := w.read(new))]
        if found:
            position, stop = min(found, key=lambda match: match[0])
            self._held = ""
            return text[: position + len(stop) * self._include_stop], stop
        held = max((w.matched for w in self._watches), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], None

    def flush(self) -> str:
        """Text still held back when the sequence ends for another reason."""
        text, self._held = self._held, ""
        return text


class _Watch:
    """Looks for one stop string in a text that comes in pieces (Knuth, Morris and Pratt, 1977).

    Attributes:
        stop: the string.
        matched: how many of its first characters the text read so far ends with.
    """

    def __init__(self, stop: str):
        self.stop = stop
        self.matched = 0
        self._borders = [0]
        for character in stop[1:]:
            self._borders.append(self._next(self._borders[-1], character))

    def read(self, text: str) -> int:
        """Returns behind which character of `text`, from 1, the string first ends; 0 if it does not."""
        for end, character in enumerate(text, 1):
            self.matched = self._next(self.matched, character)
            if self.matched == len(self.stop):
                self.matched = 0
                return end
        return 0

    def _next(self, matched: int, character: str) -> int:
        while matched and self.stop[matched] != character:
            matched = self._borders[matched - 1]
        return matched + (self.stop[matched] == character)


class _Stream(Protocol):
    def step(self, token_id: int) -> str:
        """Adds a token and returns the text that it completes."""


class _Bytes:
    """Text of tokens that are bytes, character by character as they are complete.

    What the prompt begins and the sequence does not complete is the prompt's: no sign of it is in the text.
    """

    def __init__(self, vocabulary: Vocabulary, context: list[int], skip_special_tokens: bool):
        self._vocabulary = vocabulary
        self._skips = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._begun_in_prompt = False
        for token_id in context:
            self.step(token_id)
        self._begun_in_prompt = bool(self._decoder.getstate()[0])

    def step(self, token_id: int) -> str:
        if self._skips and self._vocabulary.is_special(token_id):
            return ""
        piece = self._vocabulary.bytes_of(token_id)
        if self._begun_in_prompt and piece:
            self._begun_in_prompt = False
            if piece[0] & 0xC0 != 0x80:  # no byte that continues a character
                self._decoder.reset()
        return self._decoder.decode(piece)


class _Tokens:
    """Text of tokens that only the tokenizer's own decoder can put together."""

    def __init__(self, vocabulary: Vocabulary, context: list[int], skip_special_tokens: bool):
        self._tokenizer = vocabulary.tokenizer
        self._skips = skip_special_tokens
        if vocabulary.decode(context).endswith(
            _UNKNOWN
        ):  # it would be taken for half a character, and repeated
            context = []
        self._stream = self._started(context)

    def step(self, token_id: int) -> str:
        try:
            return self._stream.step(self._tokenizer, token_id) or ""
        except (
            Exception
        ):  # the library gives up on some sequences of invalid bytes; the next token starts afresh
            self._stream = self._started([])
            return self._stream.step(self._tokenizer, token_id) or ""

    def _started(self, context: list[int]) -> DecodeStream:
        return DecodeStream(ids=context, skip_special_tokens=self._skips)
