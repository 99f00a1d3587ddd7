"""Sending workloads to a server that speaks OpenAI's API, and noting when each token comes."""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx

from curkv.bench.measurement import Measurement, Stream, summary
from curkv.bench.workload import Workload, prompts
from curkv.sse import event_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_WARM_UP_SEED = 1 << 32
"""No run has that many repeats, so that no prompt of a measurement has been seen."""


@dataclass(frozen=True)
class Served:
    """What a server serves.

    Attributes:
        url: its base URL, without /v1.
        model: name of its first model.
        evicts: whether it is a curkv and takes eviction controls.
    """

    url: str
    model: str
    evicts: bool

    @classmethod
    def at(cls, url: str) -> Served:
        """Asks a server; the key of one that wants one is taken from OPENAI_API_KEY."""
        response = httpx.get(f"{url}/v1/models", headers=_authorization(), timeout=60)
        card = response.raise_for_status().json()["data"][0]
        return cls(url, card["id"], card.get("owned_by") == "curkv")


def _authorization() -> dict[str, str]:
    key = os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def warm_up(served: Served, tokenizer: Tokenizer) -> None:
    """Has a server do what it does at its first request only."""
    measure(served, "", Workload(1, 128, 16), tokenizer, seed=_WARM_UP_SEED)


def seconds_for(url: str, prompt: int, generated: int, number: int) -> float:
    """Seconds that a server takes for one greedy request, which is answered at once.

    Args:
        url: Its base URL, without /v1.
        prompt: Words of the prompt, of one token each in most vocabularies.
        generated: Tokens that follow.
        number: Of the prompt: another one begins in another way, so that no server has it cached.
    """
    words = [str(number), *(" " + "abcdefghij"[(i * i + number) % 10] for i in range(prompt - 1))]
    body = {"prompt": "".join(words), "max_tokens": generated, "temperature": 0, "ignore_eos": True}
    begun = time.perf_counter()
    httpx.post(f"{url}/v1/completions", json=body, headers=_authorization(), timeout=300).raise_for_status()
    return time.perf_counter() - begun


def measure(
    served: Served,
    contender: str,
    workload: Workload,
    tokenizer: Tokenizer,
    seed: int,
    kv: Mapping[str, str] | None = None,
) -> Measurement:
    """Sends a workload once.

    Args:
        served: the server.
        contender: name of the measurement.
        workload: what to send.
        tokenizer: of the model; prompts are sent as token ids.
        seed: chooses the prompts, which begin differently unless the workload has a document.
        kv: eviction controls; a context that is evicted from ends with the document.
    """
    if workload.document_tokens and "budget" in (kv or {}):
        kv = {**(kv or {}), "context_tokens": str(workload.document_tokens)}
    streams = asyncio.run(_send(served, workload, prompts(tokenizer, workload, seed), kv or {}))
    return summary(contender, workload, streams)


async def _send(
    served: Served, workload: Workload, ids: list[list[int]], kv: Mapping[str, str]
) -> list[Stream]:
    body: dict[str, Any] = {
        "model": served.model,
        "max_tokens": workload.new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "cache_salt": uuid.uuid4().hex,  # nothing is reused of what other measurements sent
    }
    if kv:
        body["kv"] = dict(kv)
    limits = httpx.Limits(max_keepalive_connections=0)  # llama.cpp closes a connection after a stream
    async with httpx.AsyncClient(
        base_url=served.url, headers=_authorization(), timeout=None, limits=limits
    ) as client:
        requests = [_stream(client, body | {"prompt": prompt}) for prompt in ids]
        if workload.document_tokens:
            return [await request for request in requests]
        return list(await asyncio.gather(*requests))


async def _stream(client: httpx.AsyncClient, body: dict[str, Any]) -> Stream:
    result = Stream(time.perf_counter(), [])
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(
                f"the server answered {response.status_code}: {(await response.aread()).decode()}"
            )
        async for line in response.aiter_lines():
            if (event := event_of(line)) is None:
                continue
            if event["choices"]:
                result.arrivals.append(time.perf_counter())
            if (usage := event.get("usage")) and (report := usage.get("kv")):
                result.kept_ratio = report["kept_ratio"]
    return result
