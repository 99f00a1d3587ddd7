"""Speed of a server under load, TTFT, inter-token latency, throughput; transformers in the same run.

Every figure of a workload is taken in one run and in turn, so that ratios hold on a noisy machine.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from tqdm import tqdm

from curkv.bench.text import token_spans

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Workload:
    """Requests sent together: `concurrency` prompts of `prompt_tokens`, each continued by `new_tokens`."""

    concurrency: int
    prompt_tokens: int
    new_tokens: int = 64


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


@dataclass(frozen=True)
class Measurement:
    """What one contender did with one workload; times in seconds.

    Attributes:
        contender: who.
        workload: what.
        ttft: mean time to first token.
        itl_p50: median time between tokens of a request.
        itl_p99: its 99th percentile.
        prefill_rate: prompt tokens per second until the last request has its first token.
        decode_rate: tokens per second from when all requests have their first token until the first ends.
        kept_ratio: share of the prompt's KV cache that was kept; None if the server does not say.
    """

    contender: str
    workload: Workload
    ttft: float
    itl_p50: float
    itl_p99: float
    prefill_rate: float
    decode_rate: float
    kept_ratio: float | None = None


@dataclass
class _Stream:
    arrivals: list[float]
    kept_ratio: float | None = None


WORKLOADS = [Workload(c, p) for p in (128, 2000, 4000) for c in (1, 8)]


def run(
    model: str,
    url: str | None,
    workloads: list[Workload],
    policy: str = "curdkv",
    budget: str = "25%",
    repeats: int = 3,
    baseline: bool = True,
    server_args: list[str] | None = None,
) -> list[Measurement]:
    """Measures the full cache, a policy at a budget, and transformers, in turn.

    A server that is not curkv is measured as it is, without eviction controls.

    Args:
        model: what the server serves; its tokenizer cuts the prompts.
        url: base URL of a running OpenAI-compatible server; None starts `curkv serve` for the run.
        workloads: what to send.
        policy: eviction policy beside `full`.
        budget: its budget.
        repeats: runs of each; the median by decode rate is reported.
        baseline: whether to run transformers' `generate` too.
        server_args: further arguments of `curkv serve`.

    Returns:
        One measurement per workload and contender.
    """
    from curkv.models.loading import load_tokenizer, resolve_model

    directory = resolve_model(model)
    tokenizer = load_tokenizer(directory)
    reference = _load_transformers(directory) if baseline else None
    results = []
    with _server(url, model, server_args or []) as base_url:
        served = Served.at(base_url)
        contenders: dict[str, dict[str, str]] = {"server": {}}
        if served.evicts:
            contenders = {
                "full": {"policy": "full"},
                f"{policy} {budget}": {"policy": policy, "budget": budget},
            }
        asyncio.run(_measure(served, Workload(1, 128, 16), [list(range(100, 228))], {}))
        for workload in tqdm(workloads, desc="workloads", unit="workload"):
            samples: dict[str, list[Measurement]] = {}
            for repeat in range(repeats):
                prompts = token_spans(tokenizer, workload.concurrency, workload.prompt_tokens, seed=repeat)
                for name, kv in contenders.items():
                    streams = asyncio.run(_measure(served, workload, prompts, kv))
                    samples.setdefault(name, []).append(_summary(name, workload, *streams))
                if reference is not None:
                    result = _run_transformers(reference, workload, prompts)
                    samples.setdefault(result.contender, []).append(result)
            for runs in samples.values():
                results.append(sorted(runs, key=lambda m: m.decode_rate)[len(runs) // 2])
    return results


def table(results: list[Measurement]) -> str:
    """Lays measurements out as Markdown; decode rates also as ratios to the workload's full cache."""
    full = {m.workload: m.decode_rate for m in results if m.contender == "full"}
    lines = [
        "| requests x prompt + new | contender | TTFT s | ITL p50 / p99 ms | prefill tok/s | decode tok/s "
        "| ratio | kept |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for m in results:
        w = m.workload
        ratio = f"{m.decode_rate / full[w]:.2f}x" if full.get(w) else "-"
        kept = f"{m.kept_ratio:.0%}" if m.kept_ratio is not None else "-"
        lines.append(
            f"| {w.concurrency} x {w.prompt_tokens:,} + {w.new_tokens} | {m.contender} | {m.ttft:.2f} "
            f"| {m.itl_p50 * 1e3:.0f} / {m.itl_p99 * 1e3:.0f} | {m.prefill_rate:.0f} | {m.decode_rate:.1f} "
            f"| {ratio} | {kept} |"
        )
    return "\n".join(lines)


async def _measure(
    served: Served, workload: Workload, prompts: list[list[int]], kv: dict[str, str]
) -> tuple[float, list[_Stream]]:
    async with httpx.AsyncClient(base_url=served.url, headers=_authorization(), timeout=None) as client:
        started = time.perf_counter()
        streams = await asyncio.gather(
            *(_stream(client, served.model, prompt, workload.new_tokens, kv) for prompt in prompts)
        )
    return started, list(streams)


async def _stream(
    client: httpx.AsyncClient, model: str, prompt: list[int], new_tokens: int, kv: dict[str, str]
) -> _Stream:
    body: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "max_tokens": new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if kv:
        body |= {"kv": kv, "cache_salt": uuid.uuid4().hex}  # contenders have prompts in common
    result = _Stream([])
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(
                f"the server answered {response.status_code}: {(await response.aread()).decode()}"
            )
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[len("data: ") :])
            if event["choices"]:
                result.arrivals.append(time.perf_counter())
            if (usage := event.get("usage")) and (report := usage.get("kv")):
                result.kept_ratio = report["kept_ratio"]
    return result


def _summary(name: str, workload: Workload, started: float, streams: list[_Stream]) -> Measurement:
    gaps = sorted(b - a for s in streams for a, b in zip(s.arrivals, s.arrivals[1:], strict=False))
    all_started = max(s.arrivals[0] for s in streams)
    first_ended = min(s.arrivals[-1] for s in streams)
    decoded = sum(all_started < at <= first_ended for s in streams for at in s.arrivals)
    kept = [s.kept_ratio for s in streams if s.kept_ratio is not None]
    return Measurement(
        contender=name,
        workload=workload,
        ttft=statistics.mean(s.arrivals[0] - started for s in streams),
        itl_p50=gaps[len(gaps) // 2],
        itl_p99=gaps[int(len(gaps) * 0.99)],
        prefill_rate=workload.concurrency * workload.prompt_tokens / (all_started - started),
        decode_rate=decoded / (first_ended - all_started) if first_ended > all_started else 0.0,
        kept_ratio=statistics.mean(kept) if kept else None,
    )


def _load_transformers(directory: Path) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model


def _run_transformers(model: PreTrainedModel, workload: Workload, prompts: list[list[int]]) -> Measurement:
    import torch

    ids = torch.tensor(prompts)
    seconds = {}
    for new_tokens in (1, workload.new_tokens):
        started = time.perf_counter()
        with torch.inference_mode():
            model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        seconds[new_tokens] = time.perf_counter() - started
    prefill = seconds[1]
    step = (seconds[workload.new_tokens] - prefill) / (workload.new_tokens - 1)
    return Measurement(
        contender="transformers",
        workload=workload,
        ttft=prefill,
        itl_p50=step,
        itl_p99=step,
        prefill_rate=ids.numel() / prefill,
        decode_rate=workload.concurrency / step,
    )


@contextmanager
def _server(url: str | None, model: str, args: list[str]) -> Iterator[str]:
    """Gives the URL of a server; starts one and stops it afterwards if there is none."""
    if url is not None:
        yield url
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "curkv.cli", "serve", "--model", model, "--port", str(port), *args]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        base_url = f"http://127.0.0.1:{port}"
        _wait_until_ready(base_url, process)
        yield base_url
    finally:
        process.terminate()
        process.wait(60)


def _wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"curkv serve ended with status {process.returncode}")
