"""A server over a scripted engine, new for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import httpx
import pytest

from curkv.config import Settings
from tests.server.scripted import ScriptedClient, running


@pytest.fixture
def engine() -> ScriptedClient:
    return ScriptedClient()


@pytest.fixture
def settings() -> Settings:
    return Settings(served_model_name="words", max_body_size=20_000)


@pytest.fixture
def url(engine: ScriptedClient, settings: Settings) -> Iterator[str]:
    with running(engine, settings) as url:
        yield url


@pytest.fixture
async def http(url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=url, timeout=10) as client:
        yield client
