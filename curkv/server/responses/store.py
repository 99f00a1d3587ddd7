"""Conversations that later responses may go on with."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

from curkv.server.chat.protocol import Message
from curkv.server.errors import APIError


@dataclass(frozen=True)
class Kept:
    """A response that is kept.

    Attributes:
        messages: the conversation up to and with its answer, without instructions.
        answer: the response, as JSON.
        size: characters of both.
    """

    messages: list[Message]
    answer: str
    size: int


class ResponseStore:
    """The newest responses of each API key, which sees only its own; in memory.

    Args:
        size: characters that are kept for a key; the least recently used give way.
    """

    def __init__(self, size: int):
        self._size = size
        self._kept: dict[str, OrderedDict[str, Kept]] = {}
        self._lock = threading.Lock()

    def put(self, key: str, response_id: str, messages: list[Message], answer: str) -> None:
        """Keeps a response; one that is larger than all room is not kept. Any thread may call it."""
        size = len(answer) + sum(len(message.model_dump_json(exclude_none=True)) for message in messages)
        with self._lock:
            kept = self._kept.setdefault(key, OrderedDict())
            kept[response_id] = Kept(messages, answer, size)
            while sum(entry.size for entry in kept.values()) > self._size:
                kept.popitem(last=False)

    def get(self, key: str, response_id: str, param: str | None = None) -> Kept:
        """Gives a response.

        Raises:
            APIError: 404, it is not kept.
        """
        with self._lock:
            kept = self._kept.get(key, OrderedDict())
            if response_id in kept:
                kept.move_to_end(response_id)
                return kept[response_id]
        message = f"no response {response_id!r:.80} is kept: never stored, or it has given way to newer ones"
        raise APIError(404, message, param, "response_not_found")

    def drop(self, key: str, response_id: str) -> None:
        """Lets go of a response.

        Raises:
            APIError: 404, it is not kept.
        """
        self.get(key, response_id)
        with self._lock:
            self._kept[key].pop(response_id, None)
