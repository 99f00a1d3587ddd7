"""Text of a growing token sequence, with stop strings cut off."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

CONTEXT_TOKENS = 8


class Detokenizer:
    """Incremental detokenisation of one sequence.

    Text that may turn out to be the start of a stop string is held back until it cannot be one any more.

    Args:
        tokenizer: the model's tokenizer.
        prompt: the prompt's token ids; the last few let word-start markers decode as in running text.
        stop: strings that end the sequence; none of them appears in the text.
        skip_special_tokens: special tokens have no text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: list[int],
        stop: tuple[str, ...] = (),
        skip_special_tokens: bool = True,
    ):
        self._tokenizer = tokenizer
        self._skips = skip_special_tokens
        self._stream = self._started(prompt[-CONTEXT_TOKENS:])
        self._stop = stop
        self._held = ""

    def append(self, token_id: int, watch: bool = True) -> tuple[str, str | None]:
        """Adds a token; stop strings count only if `watch`.

        Returns:
            The text that is now certain, and the stop string that was met, if one was.
        """
        text = self._held + self._decode(token_id)
        watched = self._stop if watch else ()
        found = [(position, stop) for stop in watched if (position := text.find(stop)) >= 0]
        if found:
            position, stop = min(found, key=lambda match: match[0])
            self._held = ""
            return text[:position], stop
        held = max((_overlap(text, stop) for stop in watched), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], None

    def flush(self) -> str:
        """Text still held back when the sequence ends for another reason."""
        text, self._held = self._held, ""
        return text

    def _decode(self, token_id: int) -> str:
        try:
            return self._stream.step(self._tokenizer, token_id) or ""
        except (
            Exception
        ):  # the library gives up on some sequences of invalid bytes; the next token starts afresh
            self._stream = self._started([])
            return self._stream.step(self._tokenizer, token_id) or ""

    def _started(self, context: list[int]) -> DecodeStream:
        return DecodeStream(ids=context, skip_special_tokens=self._skips)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper start of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
