"""What the process writes to its standard error: lines for people, or JSON for a collector."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType

POLLED = ("/health", "/metrics", "/v1/kv/state")

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(?:-.*)?")

current_request: ContextVar[Mapping[str, str]] = ContextVar("current_request", default=MappingProxyType({}))
"""`request_id` of the request that is being answered, and `trace_id` and `span_id` of who sent it."""


def names_of(request_id: str, traceparent: str) -> dict[str, str]:
    """By what a request is found in logs.

    Args:
        request_id: its id.
        traceparent: the header of that name (W3C Trace Context), "" if there is none; what is no such header
            is left out.
    """
    found = _TRACEPARENT.fullmatch(traceparent)
    trace = {"trace_id": found[1], "span_id": found[2]} if found else {}
    return {"request_id": request_id} | trace


class JsonFormatter(logging.Formatter):
    """A line of JSON for each record: `time` (ISO 8601, UTC), `level`, `logger`, `message`.

    Besides `request_id`, `trace_id` and `span_id` while a request is answered, and `exception` (a traceback).
    """

    def format(self, record: logging.LogRecord) -> str:
        """Puts a record into a line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **current_request.get(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure_logging(form: str) -> None:
    """Begins to log.

    Args:
        form: "text" or "json".
    """
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if form == "json" else text)
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    for name in ("curkv", "uvicorn.access"):
        logging.getLogger(name).setLevel(logging.INFO)
    logging.getLogger("uvicorn.access").addFilter(is_no_poll)


def is_no_poll(record: logging.LogRecord) -> bool:
    """Whether an access log's record is worth a line: what is asked every few seconds is not."""
    assert isinstance(record.args, tuple)
    return record.args[2] not in POLLED
