"""The table of limits in docs/operations.md: what exceeds a row's limit gets the status that the row says."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from curkv.engine.types import InvalidRequest
from curkv.server.errors import as_api_error
from curkv.server.limits import (
    MAX_ALL_CHOICES,
    MAX_BAD_WORDS,
    MAX_CHOICES,
    MAX_LOGPROBS,
    MAX_MESSAGES,
    MAX_OPTION_CHARACTERS,
    MAX_POLICIES,
    MAX_PROMPTS,
    MAX_PROTECTED_SPANS,
    MAX_STOP_CHARACTERS,
    MAX_STOP_STRINGS,
    MAX_STRUCTURE_CHARACTERS,
    MAX_STRUCTURE_CHOICES,
    MAX_TAGS,
    MAX_TOKEN_IDS,
    MAX_TOOLS,
)
from curkv.server.vetting import Vetting, _TakesLonger
from tests.engine.conftest import request
from tests.engine.test_faults import make_engine
from tests.server.scripted import MAX_MODEL_LEN, NoStructures, ScriptedClient
from tests.server.test_limits import server, wait_until

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"
COMPLETIONS, CHAT, EXPLAIN = "/v1/completions", "/v1/chat/completions", "/v1/kv/explain"
BODY = {"prompt": "w1", "max_tokens": 3}
USER = {"role": "user", "content": "w1"}


@dataclass(frozen=True)
class Excess:
    """Bodies of which each exceeds a limit by a little, and the server's settings."""

    bodies: list[dict[str, Any]]
    path: str = COMPLETIONS
    settings: dict[str, Any] = field(default_factory=dict)

    def __call__(self, engine: ScriptedClient) -> set[int]:
        """Statuses of the answers."""
        given = {**(BODY if self.path == COMPLETIONS else {"prompt": "w1"})}
        given = {"messages": [USER], "max_tokens": 3} if self.path == CHAT else given
        with server(engine, **self.settings) as http:
            return {http.post(self.path, json={**given, **body}).status_code for body in self.bodies}


@dataclass(frozen=True)
class Full:
    """A body that finds the queue full of another one."""

    before: dict[str, Any]
    body: dict[str, Any]
    settings: dict[str, Any]

    def __call__(self, engine: ScriptedClient) -> set[int]:
        """Statuses of the answers."""
        engine.waits = True
        headers = {"Authorization": "Bearer one"}
        with server(engine, **self.settings) as http, ThreadPoolExecutor() as others:
            waiting = others.submit(http.post, COMPLETIONS, json={**BODY, **self.before}, headers=headers)
            wait_until(lambda: bool(engine.taken))
            refused = http.post(COMPLETIONS, json={**BODY, **self.body}, headers=headers)
            engine.waits = False
            assert waiting.result().status_code == 200
        return {refused.status_code}


def slow_body(engine: ScriptedClient) -> set[int]:
    with (
        server(engine, receive_timeout=0.2) as http,
        socket.create_connection(("127.0.0.1", http.base_url.port or 0), 10) as connection,
    ):
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 9\r\n\r\n{{".encode())
        return {int(connection.recv(65536).split()[1])}


def too_many_pages(_: ScriptedClient) -> set[int]:
    engine = make_engine(num_pages=40)
    with pytest.raises(InvalidRequest, match="pages of KV cache") as error:
        engine.plan(request([1] * 300, 2))
    return {as_api_error(error.value).status_code}


def slow_request(engine: ScriptedClient) -> set[int]:
    engine.delay = 0.1
    with server(engine, request_timeout=0.15) as http:
        by_setting = http.post(COMPLETIONS, json={**BODY, "max_tokens": 50}).status_code
    with server(engine) as http:
        headers = {"X-Request-Timeout": "0.15"}
        return {
            by_setting,
            http.post(COMPLETIONS, json={**BODY, "max_tokens": 50}, headers=headers).status_code,
        }


def slow_schema(engine: ScriptedClient) -> set[int]:
    async def late(*_: Any) -> None:
        raise _TakesLonger

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NoStructures, "holds", lambda *_: False)
        patch.setattr(Vetting, "_try", late)
        return Excess([{"guided_regex": "a"}])(engine)


LONG, TOOL = "x" * MAX_STRUCTURE_CHARACTERS, {"type": "function", "function": {"name": "f"}}
EXCESSES: dict[str, Callable[[ScriptedClient], set[int]]] = {
    "bytes of a body": Excess([{"user": "x" * 2000}], settings={"max_body_size": 1000}),
    "values in the JSON": Excess(
        [{"prompt": [1] * 60}, {"logit_bias": {str(i): 1 for i in range(30)}}],
        settings={"max_body_values": 50},
    ),
    "seconds in which a header": slow_body,
    "sequences (prompts x `n`)": Full({"n": 2}, {"n": 2}, {"max_waiting": 3}),
    "of them, sequences of one API key": Full(
        {"n": 2}, {"n": 2}, {"max_waiting_per_key": 3, "api_key": ("one", "two")}
    ),
    "prompt tokens that wait": Full(
        {"prompt": "w1 " * 60}, {"prompt": "w1 " * 60}, {"max_waiting_tokens": 100}
    ),
    "tokens of prompt and output": Excess([{"max_tokens": MAX_MODEL_LEN}, {"prompt": [1] * MAX_MODEL_LEN}]),
    "pages of the cache": too_many_pages,
    "seconds that a request may take": slow_request,
    "prompts of a request": Excess([{"prompt": ["w1"] * (MAX_PROMPTS + 1)}]),
    "`n`, and choices": Excess(
        [{"n": MAX_CHOICES + 1}, {"n": MAX_CHOICES, "prompt": ["w1"] * (MAX_ALL_CHOICES // MAX_CHOICES + 1)}]
    ),
    "messages of a conversation": Excess([{"messages": [USER] * (MAX_MESSAGES + 1)}], CHAT),
    "tools": Excess(
        [{"tools": [{**TOOL, "function": {"name": f"f{i}"}} for i in range(MAX_TOOLS + 1)]}], CHAT
    ),
    "`stop`": Excess([{"stop": ["a"] * (MAX_STOP_STRINGS + 1)}, {"stop": "a" * (MAX_STOP_CHARACTERS + 1)}]),
    "`stop_token_ids`, `logit_bias`": Excess(
        [
            {"stop_token_ids": [1] * (MAX_TOKEN_IDS + 1)},
            {"logit_bias": {str(i): 1 for i in range(MAX_TOKEN_IDS + 1)}},
            {"allowed_token_ids": [1] * (MAX_TOKEN_IDS + 1)},
        ]
    ),
    "`bad_words`": Excess([{"bad_words": ["a"] * (MAX_BAD_WORDS + 1)}]),
    "`logprobs`": Excess([{"logprobs": MAX_LOGPROBS + 1}, {"prompt_logprobs": MAX_LOGPROBS + 1}]),
    "a schema, an expression": Excess(
        [
            {"guided_json": {"title": LONG}},
            {"guided_regex": LONG + "x"},
            {"guided_choice": [LONG, "x"]},
            {"guided_grammar": LONG + "x"},
        ]
    ),
    "structural tags": Excess(
        [
            {
                "response_format": {
                    "type": "structural_tag",
                    "structures": [{"begin": "a", "schema": {}, "end": ""}] * structures,
                    "triggers": ["a"] * triggers,
                }
            }
            for structures, triggers in ((MAX_TAGS + 1, 1), (1, MAX_TAGS + 1))
        ]
    ),
    "`guided_choice`": Excess([{"guided_choice": ["x"] * (MAX_STRUCTURE_CHOICES + 1)}]),
    "seconds that a schema": slow_schema,
    "`kv.protect`": Excess(
        [
            {"kv": {"policy": "snapcur", "budget": "50%", "protect": [[0, 1]] * (MAX_PROTECTED_SPANS + 1)}},
            {"kv": {"policy": "x" * (MAX_OPTION_CHARACTERS + 1)}},
        ]
    ),
    "policies of an explanation": Excess([{"policies": [{"policy": "full"}] * (MAX_POLICIES + 1)}], EXPLAIN),
}
"""What exceeds each limit, by the beginning of its row."""


def rows() -> dict[str, set[int]]:
    """Statuses that the table says, by the name of the limit; none where a connection is only closed."""
    table = OPERATIONS.read_text().split("| limit | default | flag | status |\n")[1].split("\n\n")[0]
    cells = [line.strip("| ").split(" | ") for line in table.splitlines()[1:]]
    return {row[0]: set(map(int, re.findall(r"\b[45]\d\d\b", row[-1]))) for row in cells}


def excess_of(row: str) -> Callable[[ScriptedClient], set[int]]:
    [found] = [name for name in EXCESSES if row.startswith(name) and (name != "tools" or row == name)]
    return EXCESSES[found]


@pytest.mark.parametrize(("row", "documented"), [item for item in rows().items() if item[1]])
def test_an_excess_gets_the_documented_status(engine: ScriptedClient, row: str, documented: set[int]) -> None:
    excess = excess_of(row)
    statuses = excess(engine)
    assert statuses and statuses <= documented
    if isinstance(excess, Excess):
        assert not engine.taken


def test_a_request_larger_than_the_queue_is_no_matter_of_waiting(engine: ScriptedClient) -> None:
    with server(engine, max_waiting_tokens=100) as http:
        assert http.post(COMPLETIONS, json={"prompt": ["w1 " * 60] * 2}).status_code == 400


def test_every_limit_of_the_table_is_tried() -> None:
    assert len([row for row in rows() if rows()[row]]) == len(EXCESSES)
