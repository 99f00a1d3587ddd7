"""Single requests that a stranger may send, and what others notice of them.

    .venv/bin/curkv serve --port 8010 &
    .venv/bin/python benchmarks/hostile.py --url http://127.0.0.1:8010

Beside each request a stream runs and `/health` is asked every 10 ms. The table says what the request was
answered, how long it took, the slowest answer of `/health` and the longest gap between two tokens of the
stream, in seconds. The first row sends nothing: what the machine's other load costs.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

import httpx
import typer

from curkv.bench.script import script
from curkv.tables import table

POLL_SECONDS = 0.01
QUIET_SECONDS = 2.0
"""How long others are watched while nothing is sent."""


@dataclass(frozen=True)
class Attack:
    """A request, or several at once.

    Attributes:
        name: row of the table.
        path: endpoint.
        body: makes its JSON.
        times: how many are sent at once.
    """

    name: str
    path: str
    body: Callable[[], Any]
    times: int = 1


def patterns(properties: int) -> dict[str, Any]:
    """A schema that is small and takes long to compile."""
    members = {
        f"p{i}": {"type": "string", "pattern": f"^\\p{{L}}{{1,{i % 30 + 2}}}\\p{{N}}$"}
        for i in range(properties)
    }
    return {"type": "object", "properties": members}


def completion(**fields: Any) -> dict[str, Any]:
    """A body that generates one token, unless told otherwise."""
    return {"max_tokens": 1, "temperature": 0, **fields}


ENDLESS = {"allOf": [{"type": "string", "pattern": f"^.*a.{{{i}}}b.*$"} for i in range(1, 60)]}
CRASHING = {"type": "integer", "minimum": -(2**63) - 1, "maximum": -(2**63) - 1}
WORDS = "the quick brown fox jumps over a lazy dog and "

ATTACKS = (
    Attack("schema of 1,300 patterns, 8 prompts", "/v1/completions",
           lambda: completion(prompt=["hi"] * 8, guided_json=patterns(1300))),
    Attack("the same, other names, 2 prompts", "/v1/completions",
           lambda: completion(prompt=["hi"] * 2, guided_json=patterns(1250))),
    Attack("4 M digits, /tokenize", "/tokenize", lambda: {"prompt": "0123" * 1_000_000}),
    Attack("4 M digits, completions", "/v1/completions", lambda: completion(prompt="0123" * 1_000_000)),
    Attack("8 M of a, chat", "/v1/chat/completions",
           lambda: completion(messages=[{"role": "user", "content": "a" * 8_000_000}])),
    Attack("7 M of words, completions", "/v1/completions",
           lambda: completion(prompt=WORDS * (7_000_000 // len(WORDS)))),
    Attack("600 k digits, /tokenize", "/tokenize", lambda: {"prompt": "0123" * 150_000}),
    Attack("1,000 prompts of 8,000 digits", "/v1/completions",
           lambda: completion(prompt=["0123" * 2000] * 1000)),
    Attack("6 at once of 1,024 prompts", "/v1/completions",
           lambda: completion(prompt=["hello"] * 1024), times=6),
    Attack("2,000 tokens echoed with 20 alternatives", "/v1/completions",
           lambda: completion(prompt=WORDS * 200, echo=True, logprobs=20, max_tokens=0)),
    Attack("4 M token ids", "/tokenize", lambda: {"prompt": [1] * 2_700_000}),
    Attack("1 M bad stop tokens", "/v1/completions",
           lambda: completion(prompt="x", stop_token_ids=["a"] * 1_000_000)),
    Attack("200 k logit biases", "/v1/completions",
           lambda: completion(prompt="x", logit_bias={str(i): 200 for i in range(200_000)})),
    Attack("100 k protected spans", "/v1/completions",
           lambda: completion(prompt="x", kv={"policy": "snapcur", "protect": [[0, 1]] * 100_000})),
    Attack("id 4294967296 by name", "/tokenize",
           lambda: {"prompt": [4294967296], "return_token_strs": True}),
)  # fmt: skip
DEADLY = (
    Attack("schema that never compiles", "/v1/completions",
           lambda: completion(prompt="hi", guided_json=ENDLESS)),
    Attack("schema that crashes the compiler", "/v1/completions",
           lambda: completion(prompt="hi", guided_json=CRASHING)),
)  # fmt: skip


@dataclass
class Seen:
    """What others noticed, in seconds."""

    health: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)


@contextmanager
def watched(url: str) -> Iterator[Seen]:
    """Asks for health, and reads a stream, while the context lasts."""
    seen, over, streaming = Seen(), threading.Event(), threading.Event()

    def poll() -> None:
        with httpx.Client(base_url=url, timeout=600) as http:
            while not over.is_set():
                started = time.perf_counter()
                http.get("/health")
                seen.health.append(time.perf_counter() - started)
                time.sleep(POLL_SECONDS)

    def read() -> None:
        body = completion(prompt="Once upon a time", max_tokens=4000, ignore_eos=True, stream=True)
        with httpx.Client(base_url=url, timeout=600) as http:
            while not over.is_set():
                with http.stream("POST", "/v1/completions", json=body) as answer:
                    last = None
                    for line in answer.iter_lines():
                        now = time.perf_counter()
                        if line and last is not None and streaming.is_set():
                            seen.gaps.append(now - last)
                        if line:
                            last = now
                            streaming.set()
                        if over.is_set():
                            break

    threads = [threading.Thread(target=work, daemon=True) for work in (poll, read)]
    for thread in threads:
        thread.start()
    streaming.wait(60)
    time.sleep(0.5)
    seen.health.clear()
    seen.gaps.clear()
    try:
        yield seen
    finally:
        time.sleep(0.3)
        over.set()
        for thread in threads:
            thread.join(60)


def send(url: str, attack: Attack, content: bytes, timeout: float) -> str:
    """Sends a request and returns its status."""
    headers = {"Content-Type": "application/json"}
    try:
        with httpx.Client(base_url=url, timeout=timeout) as http:
            return str(http.post(attack.path, content=content, headers=headers).status_code)
    except httpx.HTTPError as error:
        return type(error).__name__


def main(
    url: Annotated[str, typer.Option(help="A server that nobody else uses.")] = "http://127.0.0.1:8000",
    deadly: Annotated[bool, typer.Option(help="Also send what kills servers that are not prepared.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds after which a request is given up.")] = 120.0,
    only: Annotated[
        list[str] | None, typer.Option(help="Part of the names of rows wanted; repeatable.")
    ] = None,
) -> None:
    """Sends each request to a server while others use it, and says what they noticed."""
    rows = []
    with watched(url) as seen:
        time.sleep(QUIET_SECONDS)
    rows.append(["nothing", "", "", *worst(seen)])
    wanted = [*ATTACKS, *(DEADLY if deadly else ())]
    if only:
        wanted = [attack for attack in wanted if any(part in attack.name for part in only)]
    for attack in wanted:
        content = json.dumps(attack.body()).encode()
        with watched(url) as seen, ThreadPoolExecutor(attack.times) as pool:
            started = time.perf_counter()
            answers = list(pool.map(lambda _: send(url, attack, content, timeout), range(attack.times)))  # noqa: B023
            seconds = time.perf_counter() - started
        statuses = " ".join(
            status if count == 1 else f"{count}x{status}" for status, count in Counter(answers).items()
        )
        rows.append([attack.name, statuses, f"{seconds:.2f}", *worst(seen)])
        typer.echo(" | ".join(rows[-1]), err=True)
    typer.echo(table(["request", "status", "took s", "/health s", "stream's gap s"], rows))


def worst(seen: Seen) -> list[str]:
    """The slowest answer and the longest gap."""
    return [f"{max(values, default=0):.3f}" for values in (seen.health, seen.gaps)]


app = script(__doc__, main)

if __name__ == "__main__":
    app()
