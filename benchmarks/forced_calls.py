"""Forced calls of tools with random schemas through a server: do all of them parse, and follow their schema?

    .venv/bin/curkv serve --port 8010 &
    .venv/bin/python benchmarks/forced_calls.py --url http://127.0.0.1:8010

Each request offers two tools and must call one, by name or as the model likes; half stream, and a quarter
may call several or evicts its prompt's cache.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import httpx
import jsonschema
import typer

from curkv.bench.schemas import random_schema
from curkv.bench.script import script
from curkv.sse import event_of

QUESTIONS = ("What is the weather in Paris?", "Set an alarm for 7.", "Book a room for two nights.", "Hello!")
NAMES = ("get_weather", "book_room")


def body_of(draw: random.Random) -> dict[str, Any]:
    """A random request that forces a call."""
    functions = [{"name": name, "parameters": random_schema(draw)} for name in NAMES]
    named = {"type": "function", "function": {"name": draw.choice(NAMES)}}
    evicting = {"kv": {"policy": "snapcur", "budget": "50%", "recent_tokens": 16}}
    return {
        "messages": [{"role": "user", "content": draw.choice(QUESTIONS)}],
        "tools": [{"type": "function", "function": function} for function in functions],
        "tool_choice": draw.choice(["required", named]),
        "parallel_tool_calls": draw.random() < 0.25,
        "temperature": draw.choice([0, 1]),
        "seed": draw.randrange(1000),
        "max_tokens": 400,
        "stream": draw.random() < 0.5,
        **(evicting if draw.random() < 0.25 else {}),
    }


def calls_of(http: httpx.Client, body: dict[str, Any]) -> tuple[list[tuple[str, str]], str]:
    """Names and arguments of the calls that a request is answered with, and why the answer ended."""
    response = http.post("/v1/chat/completions", json=body).raise_for_status()
    if not body["stream"]:
        [choice] = response.json()["choices"]
        functions = [call["function"] for call in choice["message"].get("tool_calls") or ()]
        return [(f["name"], f["arguments"]) for f in functions], choice["finish_reason"]
    calls: list[tuple[str, str]] = []
    reason = ""
    for event in filter(None, map(event_of, response.text.splitlines())):
        for choice in event["choices"]:
            reason = choice["finish_reason"] or reason
            for delta in choice["delta"].get("tool_calls") or ():
                if delta.get("id"):
                    calls.append((delta["function"]["name"], ""))
                name, arguments = calls[delta["index"]]
                calls[delta["index"]] = name, arguments + (delta["function"].get("arguments") or "")
    return calls, reason


def verdict(body: dict[str, Any], calls: list[tuple[str, str]], reason: str) -> str:
    """What is wrong with an answer; `valid` if nothing is."""
    if reason == "length":
        return "cut off by max_tokens"
    if reason != "tool_calls" or not calls:
        return f"no call, finish_reason {reason}"
    if len(calls) > 1 and not body["parallel_tool_calls"]:
        return "several calls"
    for name, arguments in calls:
        schema = next(t["function"] for t in body["tools"] if t["function"]["name"] == name)["parameters"]
        try:
            jsonschema.validate(json.loads(arguments), schema)
        except ValueError:
            return "arguments are no JSON"
        except jsonschema.ValidationError:
            return "arguments do not follow their schema"
    return "valid"


def main(
    url: Annotated[str, typer.Option(help="The server.")] = "http://127.0.0.1:8000",
    requests: Annotated[int, typer.Option(help="How many are sent.")] = 500,
    at_once: Annotated[int, typer.Option(help="How many at a time.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the schemas and of what is asked.")] = 0,
) -> None:
    """Counts what becomes of forced calls."""
    draw, found, began = random.Random(seed), Counter[str](), time.monotonic()
    bodies = [body_of(draw) for _ in range(requests)]
    made = 0
    with httpx.Client(base_url=url, timeout=600) as http, ThreadPoolExecutor(at_once) as pool:
        for body, (calls, reason) in zip(bodies, pool.map(lambda b: calls_of(http, b), bodies), strict=True):
            found[problem := verdict(body, calls, reason)] += 1
            made += len(calls)
            if problem != "valid":
                print(problem, json.dumps(body), calls)
    print(f"{requests} requests, {made} calls, {time.monotonic() - began:.0f} s")
    for problem, count in found.most_common():
        print(f"{count} {problem}")
    raise typer.Exit(found["valid"] != requests)


app = script(__doc__, main)

if __name__ == "__main__":
    app()
