"""Server-sent events as OpenAI's API streams them, read."""

from __future__ import annotations

import json
from typing import Any

DONE = "data: [DONE]"
"""The last line of a stream that is whole."""


def event_of(line: str) -> dict[str, Any] | None:
    """What a line of a stream says; None for lines between events and for `DONE`."""
    if line == DONE or not line.startswith("data: "):
        return None
    event: dict[str, Any] = json.loads(line.removeprefix("data: "))
    return event
