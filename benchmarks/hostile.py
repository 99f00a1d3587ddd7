"""Requests that a stranger may send, one after the other, and what others notice of each.

    .venv/bin/python benchmarks/hostile.py
    .venv/bin/python benchmarks/hostile.py --url http://127.0.0.1:8010     # a server that runs already

Beside each request a stream runs and `/health` is asked every 10 ms. The table says what the request was
answered, how long it took, the slowest answer of `/health` and the one that a hundredth was slower than, and
the longest gap between two tokens of the stream. The first rows are to compare with: nothing, which is what
the machine's other load costs, and ordinary prompts, whose longest gap is a whole step.

Fails if something is answered otherwise than it should be, `/health` takes 50 ms in more than a hundredth of
the cases, or a gap is longer than two whole steps.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import typer

from curkv.bench.process import curkv_serve, running
from curkv.bench.script import script
from curkv.tables import table

POLL_SECONDS = 0.01
MEMORY = "180MiB"
"""Of the cache of a server that is started for this: less than a context of the default model takes."""
HEALTH_SECONDS = 0.05
STEPS = 2
COMPLETIONS, CHAT, TOKENIZE = "/v1/completions", "/v1/chat/completions", "/tokenize"


@dataclass(frozen=True)
class Attack:
    """A request, or several at once.

    Attributes:
        name: row of the table.
        path: endpoint.
        body: makes its JSON.
        wanted: statuses that are right.
        times: how many are sent at once.
    """

    name: str
    path: str
    body: Callable[[], Any]
    wanted: str = "200"
    times: int = 1

    def send(self, url: str, content: bytes, timeout: float) -> tuple[str, float]:
        """Sends it; returns what was answered, and the seconds that took."""
        with ThreadPoolExecutor(self.times) as pool:
            started = time.perf_counter()
            answers = list(pool.map(lambda _: post(url, self.path, content, timeout), range(self.times)))
            seconds = time.perf_counter() - started
        counts = sorted(Counter(answers).items())
        return " ".join(status if n == 1 else f"{n}x{status}" for status, n in counts), seconds


class Dripping(Attack):
    """A body that is refused for its declared length, and goes on, a byte now and then."""

    def send(self, url: str, content: bytes, timeout: float) -> tuple[str, float]:
        """See `Attack.send`; the time is that until the connection was closed."""
        where, started = urlsplit(url), time.perf_counter()
        with socket.create_connection((where.hostname or "", where.port or 80), timeout) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n"
            )
            status = connection.recv(65536).split()[1].decode()
            try:
                while time.perf_counter() - started < timeout:
                    connection.sendall(b" ")
                    time.sleep(0.1)
            except ConnectionError:
                pass
        return status, time.perf_counter() - started


def post(url: str, path: str, content: bytes, timeout: float) -> str:
    """Sends a body and returns the status of its answer, or what went wrong."""
    try:
        with httpx.Client(base_url=url, timeout=timeout) as http:
            headers = {"Content-Type": "application/json"}
            return str(http.post(path, content=content, headers=headers).status_code)
    except httpx.HTTPError as error:
        return type(error).__name__


def completion(**fields: Any) -> dict[str, Any]:
    """A body that generates one token, unless told otherwise."""
    return {"max_tokens": 1, "temperature": 0, **fields}


def conversation(text: str, **fields: Any) -> dict[str, Any]:
    """A body of a chat of one message."""
    return {"messages": [{"role": "user", "content": text}], "temperature": 0, **fields}


def patterns(properties: int) -> dict[str, Any]:
    """A schema that is small and takes long to compile."""
    members = {
        f"p{i}": {"type": "string", "pattern": f"^\\p{{L}}{{1,{i % 30 + 2}}}\\p{{N}}$"}
        for i in range(properties)
    }
    return {"type": "object", "properties": members}


def tools(count: int) -> list[dict[str, Any]]:
    """Tools with parameters of all kinds, together close to what is allowed."""
    members = {f"argument_{i}": {"type": "string", "maxLength": 40} for i in range(12)}
    parameters = {"type": "object", "properties": members, "required": list(members)}
    return [
        {"type": "function", "function": {"name": f"tool_{i}", "parameters": parameters}}
        for i in range(count)
    ]


ENDLESS = {"allOf": [{"type": "string", "pattern": f"^.*a.{{{i}}}b.*$"} for i in range(1, 60)]}
CRASHING = {"type": "integer", "minimum": -(2**63) - 1, "maximum": -(2**63) - 1}
WORDS = "the quick brown fox jumps over a lazy dog and "

NOTHING = "nothing"
ORDINARY = "an ordinary prompt of 2,000 tokens"
ATTACKS = (
    Attack("schema of 1,300 patterns, 8 prompts", COMPLETIONS,
           lambda: completion(prompt=["hi"] * 8, guided_json=patterns(1300)), "400"),
    Attack("the same, other names, 2 prompts", COMPLETIONS,
           lambda: completion(prompt=["hi"] * 2, guided_json=patterns(1250)), "400"),
    Attack("five tools", CHAT, lambda: conversation("hi", tools=tools(5), max_tokens=1)),
    Attack("4 M digits, /tokenize", TOKENIZE, lambda: {"prompt": "0123" * 1_000_000}, "400"),
    Attack("4 M digits, completions", COMPLETIONS, lambda: completion(prompt="0123" * 1_000_000), "400"),
    Attack("8 M of a, chat", CHAT, lambda: conversation("a" * 8_000_000), "400"),
    Attack("7 M of words, completions", COMPLETIONS,
           lambda: completion(prompt=WORDS * (7_000_000 // len(WORDS))), "400"),
    Attack("600 k digits, /tokenize", TOKENIZE, lambda: {"prompt": "0123" * 150_000}),
    Attack("1,000 prompts of 8,000 digits", COMPLETIONS,
           lambda: completion(prompt=["0123" * 2000] * 1000), "400"),
    Attack("2,000 tokens echoed with 20 alternatives", COMPLETIONS,
           lambda: completion(prompt=WORDS * 200, echo=True, logprobs=20, max_tokens=0)),
    Attack("2.7 M token ids", TOKENIZE, lambda: {"prompt": [1] * 2_700_000}, "413"),
    Attack("1 M bad stop tokens", COMPLETIONS,
           lambda: completion(prompt="x", stop_token_ids=["a"] * 1_000_000), "413"),
    Attack("200 k logit biases", COMPLETIONS,
           lambda: completion(prompt="x", logit_bias={str(i): 200 for i in range(200_000)}), "413"),
    Attack("100 k protected spans", COMPLETIONS,
           lambda: completion(prompt="x", kv={"policy": "snapcur", "protect": [[0, 1]] * 100_000}), "413"),
    Attack("1,024 prompts", COMPLETIONS, lambda: completion(prompt=["hello"] * 1024)),
    Attack("6 at once of 1,024 prompts", COMPLETIONS,
           lambda: completion(prompt=["hello"] * 1024), "200 5x429", times=6),
    Attack("token id 59999", COMPLETIONS, lambda: completion(prompt=[59999]), "400"),
    Attack("token id 4294967296 by name", TOKENIZE,
           lambda: {"prompt": [4294967296], "return_token_strs": True}, "400"),
    Attack("token id -1 by name", TOKENIZE, lambda: {"prompt": [-1], "return_token_strs": True}, "400"),
    Dripping("drips on after a 413", COMPLETIONS, dict, "413"),
    Attack("a short prompt, compactor", COMPLETIONS,
           lambda: completion(prompt="Hello there", kv={"policy": "compactor", "budget": "50%"})),
    Attack("chat without max_tokens, small cache", CHAT,
           lambda: conversation("Say yes.", stop=[".", " "])),
    Attack("a prompt that ends in U+FFFD", COMPLETIONS,
           lambda: completion(prompt="The word is caf\ufffd")),
    Attack("ignore_eos null", COMPLETIONS, lambda: completion(prompt="x", ignore_eos=None)),
    Attack("min_tokens above max_tokens", COMPLETIONS,
           lambda: completion(prompt="x", min_tokens=5), "400"),
    Attack("schema that is only itself", COMPLETIONS,
           lambda: completion(prompt="x", guided_json={"$ref": "#"}), "400"),
    Attack("integer constant above 2**53", COMPLETIONS,
           lambda: completion(prompt="x", guided_json={"const": 2**53 + 1}), "400"),
)  # fmt: skip
DEADLY = (
    Attack("schema that never compiles", COMPLETIONS,
           lambda: completion(prompt="hi", guided_json=ENDLESS), "400"),
    Attack("schema that crashes the compiler", COMPLETIONS,
           lambda: completion(prompt="hi", guided_json=CRASHING), "400"),
)  # fmt: skip


@dataclass
class Seen:
    """What others noticed, in seconds."""

    health: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    @property
    def p99(self) -> float:
        """What a hundredth of the answers of /health took longer than."""
        return float(np.quantile(self.health or [0.0], 0.99))

    @property
    def gap(self) -> float:
        """The longest between two tokens."""
        return max(self.gaps, default=0.0)

    @property
    def cells(self) -> list[str]:
        """Slowest health, its 99th of a hundred, longest gap, in milliseconds."""
        return [f"{1000 * seconds:.0f}" for seconds in (max(self.health, default=0.0), self.p99, self.gap)]


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
                with http.stream("POST", COMPLETIONS, json=body) as answer:
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


def run(url: str, attacks: list[Attack], timeout: float) -> bool:
    """Sends each, prints what was noticed, and returns whether that was as it should be."""
    rows, fine = [], True
    with watched(url) as seen:
        time.sleep(2)
    rows.append([NOTHING, "", "", *seen.cells, ""])
    ordinary = Attack(ORDINARY, COMPLETIONS, lambda: completion(prompt=WORDS * 200))
    step = 0.0
    for attack in (ordinary, *attacks):
        content = json.dumps(attack.body()).encode()
        with watched(url) as seen:
            statuses, seconds = attack.send(url, content, timeout)
        step = step or seen.gap
        wrong = [
            *(["status"] if statuses != attack.wanted else []),
            *(["health"] if seen.p99 > HEALTH_SECONDS else []),
            *(["gap"] if seen.gap > STEPS * step else []),
        ]
        fine = fine and not wrong
        rows.append([attack.name, statuses, f"{seconds:.2f}", *seen.cells, " ".join(wrong)])
        typer.echo(" | ".join(rows[-1]), err=True)
    heads = ["request", "status", "took s", "/health worst ms", "p99 ms", "stream's gap ms", "wrong"]
    typer.echo(table(heads, rows))
    return fine


def main(
    url: Annotated[
        str | None, typer.Option(help="A server that nobody else uses; one is started if not given.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="Model of the server that is started.")
    ] = "smollm2-135m-instruct",
    weights: Annotated[str, typer.Option(help="Its weights.")] = "int8",
    deadly: Annotated[bool, typer.Option(help="Also send what kills servers that are not prepared.")] = True,
    timeout: Annotated[float, typer.Option(help="Seconds after which a request is given up.")] = 120.0,
    only: Annotated[
        list[str] | None, typer.Option(help="Part of the names of rows wanted; repeatable.")
    ] = None,
) -> None:
    """Ends with status 1 unless all is well."""
    attacks = [*ATTACKS, *(DEADLY if deadly else ())]
    if only:
        attacks = [attack for attack in attacks if any(part in attack.name for part in only)]
    if url is not None:
        fine = run(url, attacks, timeout)
    else:
        options = ["--model", model, "--weights", weights, "--kv-cache-memory", MEMORY]
        with running(curkv_serve(*options)) as (started, _):
            fine = run(started, attacks, timeout)
    if not fine:
        raise typer.Exit(1)


app = script(__doc__, main)

if __name__ == "__main__":
    app()
