"""Large bodies are read by another reader than small ones, and mean the same."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from curkv.config import Settings
from curkv.server.bodies import LARGE_BYTES
from tests.server.scripted import ScriptedClient, running

JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "w1", "temperature": 0.1, "seed": 2**62 + 1, "user": "\u00e9\U0001f600"},
        {"prompt": "w1", "max_tokens": 10**30},
        {"prompt": "w1", "temperature": float("nan")},
        {"prompt": "\ud800"},
        ["no", "object"],
    ],
)
@pytest.mark.parametrize("ascii", [True, False])
def test_size_changes_nothing(engine: ScriptedClient, body: Any, ascii: bool) -> None:
    content = json.dumps(body, ensure_ascii=ascii).encode("utf-8", "surrogatepass")
    with running(engine, Settings(served_model_name="words")) as url:
        small, large = (
            httpx.post(f"{url}/v1/completions", content=content + b" " * padding, headers=JSON)
            for padding in (0, LARGE_BYTES)
        )
        assert small.status_code == large.status_code != 500
        if small.status_code == 200:
            assert engine.taken[0].sampling == engine.taken[1].sampling


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"\n\n" + b" " * LARGE_BYTES + b'\n{"prompt": "\xc3\xa9", x}', 19 + LARGE_BYTES),
        (b"[" * LARGE_BYTES, None),
    ],
)
def test_what_is_no_json_is_said_with_its_place(
    engine: ScriptedClient, content: bytes, place: int | None
) -> None:
    with running(engine, Settings(served_model_name="words")) as url:
        refused = httpx.post(f"{url}/v1/completions", content=content, headers=JSON)
    assert refused.status_code == 400
    message = refused.json()["error"]["message"]
    assert message.startswith("the body is not JSON: ") and len(message) < 200
    if place is not None:
        assert message.endswith(f" at character {place}")
