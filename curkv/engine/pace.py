"""How many prompt tokens a step may take before those who are waiting for their next token notice."""

from __future__ import annotations

LEAST_TOKENS = 16
"""Fewest tokens of a chunk, however slow the machine is: a prefill always goes on."""
MARGIN = 0.85
"""Share of the target that a step is planned for; the rest is for what it costs beyond the estimate."""
RECENT = 0.5
"""Weight of the newest step in an estimate: the cost of a token grows as its context does."""


class Pace:
    """Sizes the prefill of steps that also decode, so that they keep to a target inter-token latency.

    A step is taken to cost what a step of decodes costs, and so much for each prompt token. Both are learned
    from the steps before; until a prompt has been computed nobody can be waiting for a second token. The host
    does not wait for a device at the end of a step that samples nothing, so what that took shows in the next
    one that does: they are learned from together.

    Args:
        max_itl: Seconds that a step with decodes may take; None sets no limit.
        max_tokens: Most tokens of any step.
    """

    def __init__(self, max_itl: float | None, max_tokens: int):
        self._max_itl = max_itl
        self._max_tokens = max_tokens
        self.forget()

    def tokens(self, decodes: int) -> int:
        """Returns the most tokens of a step in which so many sequences decode, theirs included."""
        if self._max_itl is None or not decodes or not self._token_seconds:
            return self._max_tokens
        left = MARGIN * self._max_itl - self._decode_seconds
        return min(self._max_tokens, decodes + max(LEAST_TOKENS, int(left / self._token_seconds)))

    def forget(self) -> None:
        """Drops what was learned, from steps that compiled kernels for one."""
        self._decode_seconds = 0.0
        self._token_seconds = 0.0
        self._unsampled = (0, 0.0)

    def observe(self, decodes: int, prompt_tokens: int, seconds: float, sampled: bool = True) -> None:
        """Learns from a step that took so long for so many decodes and prompt tokens."""
        if not decodes and not prompt_tokens:
            return
        earlier_tokens, earlier_seconds = self._unsampled
        prompt_tokens, seconds = prompt_tokens + earlier_tokens, seconds + earlier_seconds
        self._unsampled = (0, 0.0) if sampled else (prompt_tokens, seconds)
        if not sampled:
            return
        if not prompt_tokens:
            self._decode_seconds = _blend(self._decode_seconds, seconds)
            return
        prefill = seconds - (self._decode_seconds if decodes else 0.0)
        if prefill > 0:
            self._token_seconds = _blend(self._token_seconds, prefill / prompt_tokens)


def _blend(old: float, new: float) -> float:
    return (1 - RECENT) * old + RECENT * new if old else new
