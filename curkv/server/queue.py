"""How much may wait: places are taken before a request costs anything and given back once it runs."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass

from curkv.engine.types import InvalidRequest
from curkv.server.errors import RETRY_AFTER_SECONDS, APIError


@dataclass(frozen=True)
class QueueLimits:
    """Most that may wait.

    Attributes:
        sequences: of all requests.
        tokens: of the prompts of all requests.
        sequences_per_key: of the requests of one API key; None: as of all.
    """

    sequences: int
    tokens: int
    sequences_per_key: int | None = None


class Queue:
    """Counts what waits: requests that are being prepared, and those that the engine has not begun.

    Into an empty queue a request is let however many sequences it has: it could never come else.

    Args:
        limits: what may wait.
    """

    def __init__(self, limits: QueueLimits):
        self._limits = limits
        self.sequences = 0
        self.tokens = 0
        self._of_key: Counter[str] = Counter()
        self._lock = threading.Lock()

    def enter(self, sequences: int, key: str) -> Place:
        """Takes places for a request.

        Args:
            sequences: choices of all its prompts.
            key: whose request it is; "" if the server has no keys.

        Raises:
            APIError: 429, there is no room for so many.
        """
        most, most_of_key = self._limits.sequences, self._limits.sequences_per_key
        with self._lock:
            of_key = self._of_key[key]
            if self.sequences and self.sequences + sequences > most:
                raise _full(f"{self.sequences} sequences wait already, at most {most} may")
            if most_of_key is not None and of_key and of_key + sequences > most_of_key:
                raise _full(f"{of_key} sequences of this API key wait already, at most {most_of_key} may")
            self.sequences += sequences
            self._of_key[key] += sequences
        return Place(self, key, sequences)

    def _hold(self, place: Place, tokens: int) -> None:
        with self._lock:
            others, most = self.tokens - place.tokens, self._limits.tokens
            if tokens > most:
                message = f"prompts of {tokens} tokens or more in one request, at most {most} are allowed"
                raise InvalidRequest(message, "prompt")
            if others + tokens > most:
                raise _full(f"prompts of {others} tokens wait already, at most {most} may")
            self.tokens, place.tokens = others + tokens, tokens

    def _leave(self, place: Place) -> None:
        with self._lock:
            self.sequences -= place.sequences
            self.tokens -= place.tokens
            self._of_key[place.key] -= place.sequences
            if not self._of_key[place.key]:
                del self._of_key[place.key]
            place.sequences = place.tokens = 0


class Place:
    """What one request takes of the queue."""

    def __init__(self, queue: Queue, key: str, sequences: int, tokens: int = 0):
        self._queue = queue
        self.key = key
        self.sequences = sequences
        self.tokens = tokens

    def hold_tokens(self, tokens: int) -> None:
        """Says how many tokens the prompts have, as far as is known; may be called from any thread.

        Raises:
            InvalidRequest: no queue has room for so many.
            APIError: 429, this one has not at present.
        """
        if self.sequences:
            self._queue._hold(self, tokens)

    def split(self, parts: list[tuple[int, int]]) -> list[Place]:
        """Makes a place of each part, (sequences, tokens), which together are all that this one holds."""
        self.sequences = self.tokens = 0
        return [Place(self._queue, self.key, *part) for part in parts]

    def leave(self) -> None:
        """Gives everything back; more than once does no harm."""
        self._queue._leave(self)


def _full(message: str) -> APIError:
    return APIError(429, message, code="queue_full", headers={"Retry-After": str(RETRY_AFTER_SECONDS)})
