"""Headers of a generating request that say how urgent it is and how long it may take."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers

from curkv.config import Settings
from curkv.engine.types import InvalidRequest

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


def read_limits(headers: Headers, priority: int, settings: Settings) -> Limits:
    """Reads the headers over the body's `priority` and the server's limit of time.

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
    return Limits(priority, timeout)
