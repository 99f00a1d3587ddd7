"""What one request may ask for, and the headers that say how urgent it is and how long it may take.

Limits that a server can change are settings; docs/operations.md has the table of all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers

from curkv.config import Settings
from curkv.engine.types import InvalidRequest

MAX_PROMPTS = 1024
MAX_CHOICES = 128
"""Most choices of one prompt."""
MAX_ALL_CHOICES = 1024
"""Most choices of all prompts of a request together."""
MAX_MESSAGES = 4096
MAX_TOOLS = 128
"""Most tools of a request, as in OpenAI's API."""
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1024
MAX_TOKEN_IDS = 1024
"""Most ids in `logit_bias` and in `stop_token_ids`; each is looked at in every step."""
MAX_BAD_WORDS = 128
MAX_LOGPROBS = 20
MAX_POLICIES = 16
"""Most policies that one explanation compares."""
MAX_PROTECTED_SPANS = 1024
MAX_OPTION_CHARACTERS = 32_768
"""Longest text of an eviction option."""
MAX_STRUCTURE_CHARACTERS = 100_000
"""Longest schema or expression, and the length of all choices together."""
MAX_STRUCTURE_CHOICES = 1000
"""Most texts to choose from; llguidance follows at most 2,000 items side by side."""
MAX_TAGS = 128
"""Most structures of a structural tag, and most triggers."""
PRIORITY = "X-Priority"
TIMEOUT = "X-Request-Timeout"

OPENAPI_PARAMETERS: list[dict[str, Any]] = [
    {
        "name": PRIORITY,
        "in": "header",
        "required": False,
        "description": "Lower runs first; wins over the body's priority.",
        "schema": {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1},
    },
    {
        "name": TIMEOUT,
        "in": "header",
        "required": False,
        "description": "Seconds after which the request ends with a 408; at most the server's limit.",
        "schema": {"type": "number", "exclusiveMinimum": 0},
    },
]


@dataclass(frozen=True)
class Limits:
    """How a request is to be treated.

    Attributes:
        priority: lower runs first.
        timeout: seconds it may take; None: as long as it likes.
    """

    priority: int
    timeout: float | None


def read_limits(headers: Headers, priority: int | None, settings: Settings) -> Limits:
    """Reads the headers over the body's `priority`, 0 if it says none, and the server's limit of time.

    Raises:
        InvalidRequest: a header has a bad value; `param` names it.
    """
    if (text := headers.get(PRIORITY)) is not None:
        if re.fullmatch(r"[+-]?[0-9]{1,10}", text) is None or not -(2**31) <= int(text) < 2**31:
            raise InvalidRequest("expected an integer of 32 bits", PRIORITY)
        priority = int(text)
    timeout = settings.limits.request_timeout
    if (text := headers.get(TIMEOUT)) is not None:
        if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text) is None or float(text) == 0:
            raise InvalidRequest("expected a number of seconds above 0", TIMEOUT)
        timeout = min(float(text), timeout or float("inf"))
    return Limits(priority or 0, timeout)
