"""What the page is made of: the state of the engine, the policies, and the files."""

from __future__ import annotations

import re

import httpx
import pytest

from curkv.cache.policies import policy_names
from curkv.config import Settings
from curkv.engine.stats import SequenceStats, StepStats
from curkv.server.page.router import FOLDER
from tests.server.scripted import ScriptedClient, running


async def test_state_shows_the_last_step(
    http: httpx.AsyncClient, engine: ScriptedClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequence = SequenceStats("cmpl-1-0", 0, "knorm", 100, 64, 0, 25, 64.0, 1500, 1600)
    stats = StepStats(1, 2, 25, 100, 2500, 10_000, 0.25, sequences=[sequence])
    monkeypatch.setattr(ScriptedClient, "stats", stats)
    state = (await http.get("/v1/kv/state")).json()
    assert state == {
        "phase": "ready",
        "model": "words",
        "running": 1,
        "waiting": 2,
        "used_bytes": 2500,
        "capacity_bytes": 10_000,
        "stranded_slots_ratio": 0.25,
        "windows": [None, None],
        "sequences": [
            {
                "request_id": "cmpl-1-0",
                "index": 0,
                "policy": "knorm",
                "prompt_tokens": 100,
                "computed_tokens": 64,
                "generation_tokens": 0,
                "budget_tokens": 25,
                "held_tokens": 64.0,
                "held_bytes": 1500,
                "peak_bytes": 1600,
            }
        ],
    }


async def test_state_of_a_server_that_loads() -> None:
    with running(None, Settings(served_model_name="words")) as url:
        async with httpx.AsyncClient(base_url=url) as http:
            state = (await http.get("/v1/kv/state")).json()
    assert (state["phase"], state["capacity_bytes"], state["sequences"]) == ("loading", 0, [])


async def test_policies_are_those_a_request_can_name(http: httpx.AsyncClient) -> None:
    cards = (await http.get("/v1/kv/policies")).json()["data"]
    assert [card["name"] for card in cards] == list(policy_names())
    assert all(card["description"] for card in cards)


async def test_the_page_and_everything_it_names_come_from_this_server(http: httpx.AsyncClient) -> None:
    files: set[str] = set()
    for address in ("/", "/conversation"):
        page = await http.get(address)
        assert page.headers["content-type"].startswith("text/html")
        assert "default-src 'self'" in page.headers["content-security-policy"]
        files |= set(re.findall(r'(?:src|href)="(/page/[^"]+)"', page.text))
    for script in (FOLDER / "static").glob("*.js"):
        text = script.read_text()
        files |= {f"/page/{name}" for name in re.findall(r'from "\./([^"]+)"', text)}
        files |= set(re.findall(r'(?:fetch|get)\("(/page/[^"]+)"\)', text))
    assert files == {f"/page/{path.name}" for path in (FOLDER / "static").iterdir()}
    for file in files:
        assert (await http.get(file)).status_code == 200
    assert not any(
        "://" in re.sub(r"http://www\.w3\.org\S+", "", path.read_text())
        for path in (FOLDER / "static").iterdir()
    )


async def test_dropping_prefixes_says_what_was_freed(http: httpx.AsyncClient) -> None:
    response = await http.delete("/v1/kv/prefixes")
    assert response.status_code == 200 and response.json() == {"freed_bytes": 4096}


async def test_prefixes_cannot_be_dropped_before_there_is_an_engine() -> None:
    with running(None, Settings(served_model_name="words")) as url:
        async with httpx.AsyncClient(base_url=url) as http:
            assert (await http.delete("/v1/kv/prefixes")).status_code == 503
