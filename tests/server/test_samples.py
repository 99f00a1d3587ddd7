"""What the page says of its samples, held against the default model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from curkv.config import Settings
from curkv.server.page.router import FOLDER
from curkv.server.run import build_client
from tests.server.scripted import running

PAGE = json.loads((FOLDER / "static/samples.json").read_text())
SAMPLES = [pytest.param(sample, id=sample["name"]) for sample in PAGE["samples"]]
STEPS = [pytest.param(step, id=step["name"]) for step in PAGE["next"]]


@pytest.fixture(scope="module")
def http(default_model_dir: Path) -> Iterator[httpx.Client]:
    memory = {"kv_cache_memory": 384 << 20, "prefix_cache_memory": 128 << 20}  # one text begins the next
    settings = Settings(model=str(default_model_dir), **memory)
    client = build_client(settings)
    with running(client, settings) as url, httpx.Client(base_url=url, timeout=300) as http:
        yield http
    client.stop()


def answer(http: httpx.Client, sample: dict[str, Any], boundary: bool = False, **kv: str) -> str:
    """What the page shows: greedy, the question behind the text."""
    text = "\n\n".join(PAGE["days"][: sample["days"]]) + "\n\n"
    mark = {"cache_control": {"type": "ephemeral"}} if boundary else {}
    content = [{"type": "text", "text": text, **mark}, {"type": "text", "text": PAGE["question"]}]
    whole = text + PAGE["question"]
    body = {"messages": [{"role": "user", "content": content if boundary else whole}]}
    response = http.post("/v1/chat/completions", json=body | {"max_tokens": 24, "temperature": 0, "kv": kv})
    return str(response.raise_for_status().json()["choices"][0]["message"]["content"])


@pytest.mark.parametrize("sample", SAMPLES)
def test_the_recommended_setting_answers(http: httpx.Client, sample: dict[str, Any]) -> None:
    assert PAGE["answer"] in answer(http, sample, **PAGE["recommended"])


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("step", STEPS)
def test_the_next_steps_come_out_as_they_say(
    http: httpx.Client, sample: dict[str, Any], step: dict[str, Any]
) -> None:
    said = answer(http, sample, step["boundary"], policy=step["policy"], budget=step["budget"])
    assert (PAGE["answer"] in said) == step["answers"]
