"""Whether two checkouts give the same answers, bit for bit: greedy tokens, log-probabilities and kept sets.

    git worktree add /tmp/before HEAD~1
    .venv/bin/python benchmarks/unchanged.py record --checkout /tmp/before before.json
    .venv/bin/python benchmarks/unchanged.py record --checkout . after.json
    .venv/bin/python benchmarks/unchanged.py compare before.json after.json

A record holds, for every type of weights and of cache, what a server of that checkout answers to 16 prompts
of 40 to 1,600 tokens under six policies, with its prefix cache on: the generated ids with their
log-probabilities, the usage, and a digest of what every head keeps. Only HTTP is used, so that the two may
differ in everything behind it. Records of different machines differ: kernels round by what a CPU can do.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from tqdm import tqdm

from curkv.bench.process import curkv_serve, running
from curkv.bench.script import script
from curkv.bench.text import documentation_text

SETUPS = tuple(product(("float32", "int8", "int4"), ("float16", "int8")))
POLICIES: tuple[dict[str, Any], ...] = (
    {"policy": "full"},
    {"policy": "snapcur", "budget": "25%"},
    {"policy": "adacurdkv", "budget": "25%"},
    {"policy": "h2o", "budget": "50%", "decode_budget": "256tok"},
    {"policy": "compactor", "budget": "25%", "allocation": "adaptive"},
    {"policy": "criticalkv", "budget": "12.5%"},
)
NEW_TOKENS = 24


def prompts(count: int) -> list[str]:
    """Texts of Python's documentation of growing length, every second one beginning like the one before."""
    text = documentation_text()
    starts = [20_000 * (i // 2) for i in range(count)]
    return [text[start : start + round(170 * 1.26**i)] for i, start in enumerate(starts)]


@contextmanager
def server(checkout: Path, weights: str, kv_dtype: str) -> Iterator[httpx.Client]:
    """Runs the server of a checkout; yields a client for it."""
    options = ["--weights", weights, "--kv-dtype", kv_dtype, "--kv-cache-memory", "1GiB"]
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve()), "PYTHONSAFEPATH": "1"}
    with (
        running(curkv_serve(*options), environment=environment) as (url, _),
        httpx.Client(base_url=url, timeout=600) as client,
    ):
        yield client


def posted(client: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request, which has to be one."""
    response = client.post(path, json=body)
    if response.is_error:
        raise typer.BadParameter(f"{body['prompt'][:40]!r}, {body.get('kv')}: {response.text}")
    answer: dict[str, Any] = response.json()
    return answer


def ask(client: httpx.Client, prompt: str, kv: dict[str, Any]) -> dict[str, Any]:
    """One greedy answer, and what every head would keep of the prompt."""
    body = {"prompt": prompt, "kv": kv, "max_tokens": NEW_TOKENS, "temperature": 0, "logprobs": 1}
    answer = posted(client, "/v1/completions", {**body, "ignore_eos": True})
    choice = answer["choices"][0]
    record = {
        "text": choice["text"],
        "tokens": choice["logprobs"]["tokens"],
        "logprobs": choice["logprobs"]["token_logprobs"],
        "usage": answer["usage"],
    }
    if kv["policy"] != "full":
        asked = {"prompt": prompt, "policies": [{k: v for k, v in kv.items() if k != "decode_budget"}]}
        policy = posted(client, "/v1/kv/explain", asked)["policies"][0]
        kept = json.dumps([policy["kept"], policy["error"]]).encode()
        record["kept"] = hashlib.sha256(kept).hexdigest()
    return record


def record(
    output: Annotated[Path, typer.Argument(help="JSON file to write.")],
    checkout: Annotated[Path, typer.Option(help="Whose server to ask.")] = Path("."),
    count: Annotated[int, typer.Option(help="Prompts.")] = 16,
) -> None:
    """Writes down what a checkout answers, about a minute for each type of weights and cache."""
    records: dict[str, Any] = {}
    cases = list(product(prompts(count), POLICIES))
    with tqdm(total=len(SETUPS) * len(cases), unit=" answers") as bar:
        for weights, kv_dtype in SETUPS:
            with server(checkout, weights, kv_dtype) as client:
                for i, (prompt, kv) in enumerate(cases):
                    key = f"weights {weights}, cache {kv_dtype}, prompt {i // len(POLICIES)}, {kv['policy']}"
                    records[key] = ask(client, prompt, kv)
                    bar.update()
    output.write_text(json.dumps(records, indent=1))


def compare(before: Path, after: Path) -> None:
    """Counts what two records agree on; fails unless that is everything."""
    first, second = (json.loads(path.read_text()) for path in (before, after))
    shared = [key for key in first if key in second]
    fields = ("tokens", "logprobs", "usage", "kept")
    for field in fields:
        cases = [key for key in shared if field in first[key]]
        differing = [key for key in cases if first[key][field] != second[key].get(field)]
        typer.echo(f"{field:9} {len(cases) - len(differing):4} of {len(cases)} equal")
        for key in differing[:5]:
            typer.echo(f"          {key}")
    if first != second:
        raise typer.Exit(1)


app = script(__doc__, record, compare)

if __name__ == "__main__":
    app()
