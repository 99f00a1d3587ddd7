"""What every client is asked to do, and how it is written down: a line of JSON for each case.

A client's script is given the server's address and calls `main` with a function for each case. A function
that returns has done it; `NotOurs` says that the client or the model fails, any other exception that the
server does.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import signal
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

CASES = (
    "chat",
    "stream",
    "json schema",
    "tools auto",
    "tools required",
    "tools streamed",
    "tools parallel",
    "tool history",
    "grammar",
    "responses",
    "embeddings",
)
SECONDS = 120

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
BASE = f"{URL}/v1"
MODEL = "smollm2-135m-instruct"

QUESTION = "What is the weather in Paris?"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
PLACE = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather in a city", "parameters": PLACE},
}
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
}
HISTORY = [
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "18 degrees and sunny"},
]


class NotOurs(Exception):
    """The client or the model is at fault; the message says why."""


def check(condition: object, what: str) -> None:
    """Fails a case with what was found."""
    if not condition:
        raise AssertionError(what)


def check_call(name: str | None, arguments: str | dict[str, Any]) -> None:
    """Fails a case whose call is not one of `get_weather` with a city."""
    given = json.loads(arguments) if isinstance(arguments, str) else arguments
    check(name == "get_weather" and isinstance(given.get("city"), str), f"{name}({arguments})")


def main(client: str, package: str | None, cases: dict[str, Callable[[], Any]]) -> None:
    """Runs the cases of a client; those of `CASES` that are not given are not its own.

    Args:
        client: its name, with its version if no package here has it.
        package: the package whose version is told.
        cases: what to run.
    """
    warnings.simplefilter("ignore")
    loop = asyncio.Runner()  # one for all cases: clients keep connections
    for case, run in cases.items():
        assert case in CASES, case
        signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(SECONDS)
        result, reason = "yes", ""
        try:
            if inspect.iscoroutinefunction(run):
                loop.run(run())
            else:
                run()
        except NotOurs as error:
            result, reason = "not ours", str(error)
        except BaseException as error:
            result, reason = "no", f"{type(error).__name__}: {error}"
        finally:
            signal.alarm(0)
        reason = " ".join(reason.split())[:300]
        line = {
            "client": client,
            "version": version(package) if package is not None else "",
            "case": case,
            "result": result,
            "reason": reason,
        }
        print("\n" + json.dumps(line), flush=True)


def _too_long(*_: object) -> None:
    raise TimeoutError(f"no answer in {SECONDS} s")
