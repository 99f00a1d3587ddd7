"""Thousands of mixed requests, many of which go away: all is accounted for afterwards, and answers are equal.

    .venv/bin/python benchmarks/soak.py --requests 10000
    .venv/bin/python benchmarks/soak.py --model smollm2-135m-instruct --kv-cache-memory 48MiB --requests 300

Starts a server with a pool small enough to preempt, asks each distinct request alone, under a salt of its own
so that no prefix helps it, and then sends them mixed: every policy, shared beginnings, marked contexts,
structured output, tools, several choices, log-probabilities, echoes, explanations, one bad request in 500,
and one in eight is the next turn of a conversation, in a session and under a prefix store.
Some go away: streams after a random piece, others after a random part of the time that their kind takes.

Prints a table. Fails unless every answer that was waited for equals the one alone; running, waiting, used
bytes, sequences and, once dropped, held prefixes are 0; descriptors and threads are no more than before; and
resident memory grew by less than `--growth` per thousand requests over the last half.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import psutil
import typer
from tqdm import tqdm

from curkv.bench.process import curkv_serve, running
from curkv.bench.script import script
from curkv.bench.small_model import write_small_model
from curkv.bench.text import documentation_text
from curkv.cache.policies import get_policy
from curkv.sse import event_of
from curkv.tables import table

COMPLETIONS, CHAT, EXPLAIN = "/v1/completions", "/v1/chat/completions", "/v1/kv/explain"
TALK_ONE_IN = 8
"""Of that many requests one is the next turn of a conversation."""
TALKS = 6
"""Conversations at once."""
POISONED_ONE_IN = 500
SAMPLES = 200
"""How often the server's process is looked at."""

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo", "Lima"]}},
            "required": ["city"],
        },
    },
}
ENDLESS = {"allOf": [{"type": "string", "pattern": f"^.*a.{{{i}}}b.*$"} for i in range(1, 60)]}
BAD: tuple[tuple[str, Any], ...] = (
    (COMPLETIONS, {"prompt": ""}),
    (COMPLETIONS, {"prompt": "word " * 200_000}),
    (COMPLETIONS, {"prompt": "x", "max_tokens": 10**6}),
    (COMPLETIONS, {"prompt": [2**40]}),
    (COMPLETIONS, {"prompt": [-1]}),
    (COMPLETIONS, {"prompt": "x", "stop_token_ids": [10**6]}),
    (COMPLETIONS, {"prompt": "x", "logit_bias": {"999999": 1}}),
    (COMPLETIONS, {"prompt": "x", "temperature": "hot"}),
    (COMPLETIONS, {"prompt": "x", "n": 10**4}),
    (COMPLETIONS, {"prompt": "x", "guided_json": {"type": "nonsense"}}),
    (COMPLETIONS, {"prompt": "x", "guided_json": ENDLESS}),
    (COMPLETIONS, {"prompt": "x", "guided_json": {"type": "integer", "maximum": -(2**63) - 1}}),
    (COMPLETIONS, {"prompt": "x", "guided_regex": "(?=a)b"}),
    (COMPLETIONS, {"prompt": "x", "kv": {"policy": "no-such"}}),
    (COMPLETIONS, {"prompt": "x", "kv": {"policy": "snapkv", "budget": "101%"}}),
    (COMPLETIONS, {"prompt": "x", "kv": {"no_such_option": 1}}),
    (CHAT, {"messages": []}),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}),
    (EXPLAIN, {"prompt": "x", "policies": [{"policy": "no-such"}]}),
    (COMPLETIONS, ["no", "object"]),
)
NOTHING_LEFT = {
    "running": "curkv:num_requests_running",
    "waiting": "curkv:num_requests_waiting",
    "used bytes": "curkv:kv_cache_used_bytes",
    "held bytes after DELETE": "curkv:prefix_cache_held_bytes",
}


@dataclass(frozen=True)
class Case:
    """A request that is good and always gets the same answer.

    Attributes:
        kind: `greedy`, `seeded` or `explained`.
        path: endpoint.
        body: its JSON, without `stream`.
    """

    kind: str
    path: str
    body: dict[str, Any]

    @property
    def key(self) -> str:
        """The same for the same request."""
        return json.dumps([self.path, self.body], sort_keys=True)


@dataclass
class Answer:
    """What a request was answered: tokens and log-probabilities of each choice, or what would be kept."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[float]] = field(default_factory=dict)
    kept: Any = None

    def add(self, body: dict[str, Any]) -> None:
        """Takes an answer, or an event of a stream."""
        if "policies" in body:
            self.kept = [(policy["kept"], policy["head_errors"]) for policy in body["policies"]]
        for choice in body.get("choices", ()):
            index, reported = choice["index"], choice.get("logprobs") or {}
            values = reported.get("token_logprobs") or [x["logprob"] for x in reported.get("content") or ()]
            self.tokens.setdefault(index, []).extend(choice.get("token_ids") or ())
            self.logprobs.setdefault(index, []).extend(value for value in values if value is not None)

    def distance(self, other: Answer) -> float:
        """Largest difference of two log-probabilities at the same place."""
        pairs = (zip(self.logprobs[i], other.logprobs.get(i, ()), strict=False) for i in self.logprobs)
        return max((abs(a - b) for choice in pairs for a, b in choice), default=0.0)


@dataclass
class Talk:
    """A conversation in a session, whose turns go on from each other.

    Attributes:
        name: of the session.
        kv: its options.
        ids: what was said so far.
    """

    name: str
    kv: dict[str, Any]
    ids: list[int] = field(default_factory=list)

    def body(self, rng: random.Random) -> dict[str, Any]:
        """The next turn."""
        said = [rng.randrange(90) for _ in range(rng.randint(8, 60))]
        kv = {**self.kv, "session": self.name}
        return {"prompt": self.ids + said, "max_tokens": 12, "ignore_eos": True, "return_token_ids": True,
                "temperature": 0, "kv": kv}  # fmt: skip


@dataclass
class Sample:
    """The server's process at one moment."""

    done: int
    mebibytes: float
    threads: int
    descriptors: int


@dataclass
class Seen:
    """What happened."""

    statuses: Counter[str] = field(default_factory=Counter)
    compared: Counter[str] = field(default_factory=Counter)
    equal: Counter[str] = field(default_factory=Counter)
    distance: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    unequal: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    started: int = 0
    turns: int = 0
    turn_tokens: int = 0
    turn_cached: int = 0

    @property
    def done(self) -> int:
        """Requests that are over."""
        return sum(self.statuses.values())


def draw(rng: random.Random, policy: str, documents: Sequence[str]) -> Case:
    """A request under a policy."""
    kv: dict[str, Any] = {"policy": policy}
    if policy != "full":
        kv |= {"budget": rng.choice(["25%", "50%"]), "sink_tokens": 2, "recent_tokens": 4}
        decoding = rng.choice([{}, {}, {"decode_budget": "96tok", "decode_interval": 16}])
        kv |= {} if get_policy(policy).needs.repetition else decoding
    document = rng.choice(documents)[: rng.choice([200, 500, 1000])]
    question = (
        f"\n\n{rng.choice(['What', 'Why', 'Where'])} is {rng.choice(documents)[: rng.randint(10, 60)]}?"
    )
    body: dict[str, Any] = {
        "kv": kv,
        "max_tokens": rng.choice([4, 12, 40]),
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    free = {**body, "prompt": document + question, "logprobs": 1}
    match rng.randrange(10):
        case 0:
            once = policy == "full" or get_policy(policy).needs.repetition
            kv |= {} if once else {"prefill": "streaming", "prefill_chunk": 128}
            return Case("greedy", COMPLETIONS, free)
        case 1:
            return Case("greedy", COMPLETIONS, {**free, "echo": True})
        case 2:
            return Case("greedy", COMPLETIONS, {**free, "n": 2, "prompt": [document, document + question]})
        case 3:
            return Case(
                "seeded", COMPLETIONS, {**free, "n": 3, "temperature": 0.8, "seed": rng.randrange(99)}
            )
        case 4:
            forms = [{"regex": "[a-z]{1,12}"}, {"choice": ["yes", "no"]}, {"json": SCHEMA}]
            return Case("greedy", COMPLETIONS, {**free, "structured_outputs": rng.choice(forms)})
        case 5:
            kv.pop("decode_budget", None)
            return Case(
                "explained", EXPLAIN, {"prompt": free["prompt"], "policies": [kv, {"policy": "full"}]}
            )
        case 6 | 7:
            marked = {"type": "text", "text": document, "cache_control": {"type": "ephemeral"}}
            content = [marked, {"type": "text", "text": question}]
        case 8:
            messages = [{"role": "user", "content": question}]
            tools = {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 64}
            return Case("greedy", CHAT, {**body, "messages": messages, "logprobs": True, **tools})
        case _:
            return Case("greedy", COMPLETIONS, free)
    messages_ = [{"role": "user", "content": content}]
    return Case("greedy", CHAT, {**body, "messages": messages_, "logprobs": True})


async def ask(
    http: httpx.AsyncClient, path: str, body: Any, pieces: int | None = None
) -> tuple[str, Answer | None]:
    """Sends a request.

    Args:
        http: client of the server.
        path: endpoint.
        body: its JSON.
        pieces: of a stream, after which the client goes away.

    Returns:
        Status, or what went wrong; and the answer if it is whole.
    """
    answer = Answer()
    if not isinstance(body, dict) or not body.get("stream"):
        response = await http.post(path, json=body)
        if response.status_code == 200:
            answer.add(response.json())
        return str(response.status_code), answer
    async with http.stream("POST", path, json=body) as response:
        async for line in response.aiter_lines():
            if (event := event_of(line)) is None:
                continue
            if "error" in event:
                return "error in a stream", None
            answer.add(event)
            if pieces is not None and (pieces := pieces - 1) < 0:
                return "gone", None
        return str(response.status_code), answer


class Soak:
    """Sends requests to a server and looks at its process.

    Args:
        url: the server.
        process: its process.
        gone: share of the requests that go away.
        total: requests.
        seconds: after which no more are sent.
    """

    def __init__(self, url: str, process: psutil.Process, gone: float, total: int, seconds: float) -> None:
        self.url, self.process, self.gone, self.total, self.seconds = url, process, gone, total, seconds
        self.seen, self.alone = Seen(), dict[str, Answer]()
        self.talks: dict[int, Talk] = {}

    def client(self) -> httpx.AsyncClient:
        """A client with as many connections as it likes."""
        return httpx.AsyncClient(base_url=self.url, timeout=600, limits=httpx.Limits())

    def sample(self) -> Sample:
        """Looks at the process."""
        memory, process = self.process.memory_info().rss / 2**20, self.process
        return Sample(self.seen.done, memory, process.num_threads(), process.num_fds())

    async def ask_alone(self, cases: Sequence[Case]) -> None:
        """Asks each request on the idle server."""
        async with self.client() as http:
            for i, case in enumerate(tqdm(cases, desc="alone", unit=" requests")):
                salt = {} if case.path == EXPLAIN else {"cache_salt": f"alone {i}"}
                started = time.monotonic()
                status, answer = await ask(http, case.path, case.body | salt)
                if status != "200" or answer is None:
                    raise RuntimeError(f"alone, a request was answered {status}: {case.key}")
                self.seen.seconds[case.path] = time.monotonic() - started
                self.alone[case.key] = answer

    async def send(self, http: httpx.AsyncClient, rng: random.Random, case: Case) -> None:
        """Sends a request among others; some go away."""
        seen, share = self.seen, self.gone
        behind = share * seen.started - seen.statuses["gone"]
        leaves = rng.random() < share + 0.05 * behind
        seen.started += 1
        stream = case.path != EXPLAIN and rng.random() < 0.5
        body, started = case.body | ({"stream": True} if stream else {}), time.monotonic()
        pieces = rng.randrange(case.body["max_tokens"]) if leaves and stream else None
        patience = rng.random() * seen.seconds[case.path] if leaves and not stream else None
        try:
            async with asyncio.timeout(patience):
                status, answer = await ask(http, case.path, body, pieces)
        except TimeoutError:
            status, answer = "gone", None
        seen.statuses[status] += 1
        if status == "200" and answer is not None:
            seen.seconds[case.path] += 0.1 * (time.monotonic() - started - seen.seconds[case.path])
            self.compare(case, answer)

    async def talk(
        self, http: httpx.AsyncClient, rng: random.Random, index: int, policies: Sequence[str]
    ) -> None:
        """Sends the next turn of a conversation, at times two at once; a long one begins anew."""
        number = rng.randrange(TALKS)
        talk = self.talks.get(number)
        if talk is None or len(talk.ids) > 600:
            policy = rng.choice(policies)
            talk = Talk(f"talk-{index}", {"policy": policy, **({"budget": "80"} if policy != "full" else {})})
            self.talks[number] = talk
        body = talk.body(rng)
        status, leaves = "gone", rng.random() < self.gone
        self.seen.started += 1
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(rng.random() * 0.5 if leaves else None):
                response = await http.post(COMPLETIONS, json=body)
                status = str(response.status_code)
        self.seen.statuses[status] += 1
        if status == "200":
            usage, ids = response.json()["usage"], response.json()["choices"][0]["token_ids"]
            self.seen.turns += 1
            self.seen.turn_tokens += usage["prompt_tokens"]
            self.seen.turn_cached += usage["prompt_tokens_details"]["cached_tokens"]
            talk.ids = body["prompt"] + ids

    def compare(self, case: Case, answer: Answer) -> None:
        """Holds an answer against the one alone."""
        seen, alone = self.seen, self.alone[case.key]
        seen.compared[case.kind] += 1
        seen.equal[case.kind] += answer == alone
        seen.distance[case.kind] = max(seen.distance.get(case.kind, 0.0), answer.distance(alone))
        if answer != alone:
            seen.unequal.append(
                f"tokens {answer.tokens == alone.tokens}, {answer.distance(alone):.3g}: {case.key}"
            )

    async def send_all(self, cases: Sequence[Case], policies: Sequence[str], users: int, seed: int) -> None:
        """Sends everything, so many at once."""
        room, every = asyncio.Semaphore(users), max(1, self.total // SAMPLES)
        deadline = time.monotonic() + self.seconds
        with tqdm(total=self.total, desc="mixed", unit=" requests") as bar:
            async with self.client() as http:

                async def one(index: int) -> None:
                    rng = random.Random(seed * 10**6 + index)
                    async with room:
                        if time.monotonic() > deadline:
                            return
                        if index % POISONED_ONE_IN == POISONED_ONE_IN // 2:
                            self.seen.started += 1
                            path, body = BAD[index // POISONED_ONE_IN % len(BAD)]
                            status, _ = await ask(http, path, body)
                            self.seen.statuses[
                                "refused" if status in ("400", "413") else f"poison {status}"
                            ] += 1
                        elif index % TALK_ONE_IN == 0:
                            await self.talk(http, rng, index, policies)
                        else:
                            await self.send(http, rng, rng.choice(cases))
                    bar.update()
                    if self.seen.done % every == 0:
                        self.seen.samples.append(self.sample())

                await asyncio.gather(*map(one, range(self.total)))

    async def left(self) -> dict[str, float]:
        """What is still held when all are gone, waited for for ten seconds."""
        for _ in range(100):
            async with self.client() as http:
                for session in (await http.get("/v1/kv/sessions")).json()["data"]:
                    await http.delete(f"/v1/kv/sessions/{session['id']}")
                await http.delete("/v1/kv/prefixes")
                figures = metrics((await http.get("/metrics")).text)
                sequences = (await http.get("/v1/kv/state")).json()["sequences"]
            left = {name: figures[metric] for name, metric in NOTHING_LEFT.items()}
            left["sequences"] = len(sequences)
            if not any(left.values()):
                break
            await asyncio.sleep(0.1)
        return left


def metrics(text: str) -> dict[str, float]:
    """Figures by name, the last one of those that have several labels."""
    pairs = (line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
    return {name.split("{")[0]: float(value) for name, value in pairs}


async def soak(run: Soak, distinct: int, users: int, seed: int, growth: float) -> bool:
    """Runs everything and prints what was found; whether all is well."""
    async with run.client() as http:
        policies = [policy["name"] for policy in (await http.get("/v1/kv/policies")).json()["data"]]
    rng, text = random.Random(seed), documentation_text()
    documents = [text[20_000 * i :][:1000] for i in range(8)]
    cases = [draw(rng, policies[i % len(policies)], documents) for i in range(distinct)]
    await run.ask_alone(cases)
    await run.left()  # so that what only the end asks for is no news to the process
    run.seen.samples.append(run.sample())
    started = time.monotonic()
    await run.send_all(cases, policies, users, seed)
    seconds, left = time.monotonic() - started, await run.left()
    await asyncio.sleep(1)
    end, seen = run.sample(), run.seen
    async with run.client() as http:
        figures = metrics((await http.get("/metrics")).text)
    first, last = np.array_split(np.array([(s.done, s.mebibytes) for s in seen.samples]), 2)
    slope = float(np.polyfit(last[:, 0] / 1000, last[:, 1], 1)[0])
    half = seen.samples[: len(first)]
    threads, descriptors = max(s.threads for s in half), max(s.descriptors for s in half)
    statuses = seen.statuses
    other = {status: count for status, count in statuses.items() if status not in ("200", "gone", "refused")}
    rows = [
        [
            "requests",
            f"{seen.done} in {seconds:.0f} s, {users} at once; {distinct} distinct, {len(policies)} policies",
        ],
        ["answered / gone / refused", " / ".join(str(statuses[key]) for key in ("200", "gone", "refused"))],
        ["anything else", str(other or 0)],
        ["preemptions", f"{figures['curkv:num_preemptions_total']:.0f}"],
        ["prompt tokens from prefixes", f"{figures['curkv:prefix_cache_hits_total']:.0f}"],
        [
            "turns of conversations; tokens of their prompts, of these found",
            f"{seen.turns}; {seen.turn_tokens}, {seen.turn_cached}",
        ],
        [
            "read from the prefix store; written; skipped",
            "; ".join(
                f"{figures[f'curkv:prefix_store_{name}_total']:.0f}"
                for name in ("hits", "written", "skipped")
            ),
        ],
        *(
            [
                f"{kind} equal",
                f"{seen.equal[kind]} of {n}, log-probabilities within {seen.distance[kind]:.2g}",
            ]
            for kind, n in sorted(seen.compared.items())
        ),
        *([f"left: {name}", f"{value:.0f}"] for name, value in left.items()),
        ["descriptors, most in the first half / at the end", f"{descriptors} / {end.descriptors}"],
        ["threads, most in the first half / at the end", f"{threads} / {end.threads}"],
        ["resident MiB: first, middle, end", f"{first[0, 1]:.0f}, {last[0, 1]:.0f}, {end.mebibytes:.0f}"],
        ["MiB per 1,000 requests, last half", f"{slope:+.2f}"],
    ]
    typer.echo(table(["", ""], rows))
    for line in sorted(set(seen.unequal))[:20]:
        typer.echo(line, err=True)
    flat = slope < growth and end.threads <= threads and end.descriptors <= descriptors
    return flat and not other and not seen.unequal and not any(left.values())


def main(
    model: Annotated[
        str, typer.Option(help="small: a random one of two layers; or what `serve --model` takes.")
    ] = "small",
    requests: int = 10_000,
    distinct: Annotated[int, typer.Option(help="Different requests, each asked alone too.")] = 420,
    users: Annotated[int, typer.Option(help="Requests in flight.")] = 16,
    gone: Annotated[float, typer.Option(help="Share that goes away.")] = 0.3,
    kv_cache_memory: Annotated[str, typer.Option(help="The pool, small enough to preempt.")] = "2MiB",
    weights: Annotated[str, typer.Option(help="As of `serve`.")] = "auto",
    minutes: Annotated[float, typer.Option(help="After which no more are sent.")] = 600,
    growth: Annotated[float, typer.Option(help="MiB that memory may grow by, per 1,000 requests.")] = 1.0,
    seed: int = 0,
) -> None:
    """Ends with status 1 unless all is well."""
    with tempfile.TemporaryDirectory() as directory, tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        if model == "small":
            write_small_model(Path(directory))
            model = directory
        options = ["--kv-cache-memory", kv_cache_memory, "--weights", weights, "--max-model-len", "1024"]
        options += ["--prefix-store", f"{directory}/store"]
        with running(curkv_serve("--model", model, *options), log) as (url, process):
            run = Soak(url, psutil.Process(process.pid), gone, requests, 60 * minutes)
            try:
                fine = asyncio.run(soak(run, distinct, users, seed, growth))
            finally:
                log.seek(0)
                complaints = [line for line in log if " INFO " not in line and " WARNING " not in line]
                typer.echo("".join(complaints[:100]), err=True)
    if not fine:
        raise typer.Exit(1)


app = script(__doc__, main)

if __name__ == "__main__":
    app()
