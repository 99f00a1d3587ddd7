"""Does every panel of the Grafana dashboard show data? Asks a Prometheus that scrapes a server under load.

    python benchmarks/dashboard.py                        # starts a server of the default model
    python benchmarks/dashboard.py --url http://host:8000

Needs `prometheus` and `promtool` (Debian: apt install prometheus). Exits with 1 if a panel stays empty.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
import yaml

from curkv.bench.process import curkv_serve, running
from curkv.bench.script import script
from curkv.bench.text import documentation_text

DOCKER = Path(__file__).parents[1] / "docker"
DASHBOARD = DOCKER / "grafana" / "dashboards" / "curkv.json"
CONFIG = DOCKER / "prometheus"

CONTROLS: list[dict[str, str]] = [
    {"policy": "full"},
    {"policy": "curdkv", "budget": "25%"},
    {"policy": "adacurdkv", "budget": "25%"},
    {"policy": "knorm", "budget": "50%", "decode_budget": "128"},
]


def main(
    url: Annotated[str | None, typer.Option(help="A running server; without it one is started.")] = None,
    requests: Annotated[int, typer.Option(help="Ended before the panels are evaluated.")] = 16,
    users: Annotated[int, typer.Option(help="Requests at once.")] = 4,
    prompt_words: int = 150,
) -> None:
    """Checks the configuration, makes load, evaluates every panel and prints a table."""
    for command in (("check", "config", "prometheus.yml"), ("test", "rules", "rules_test.yml")):
        subprocess.run(["promtool", *command], cwd=CONFIG, check=True)
    with contextlib.ExitStack() as stack:
        if url is None:
            quiet = stack.enter_context(open(os.devnull, "w"))
            url, _ = stack.enter_context(running(curkv_serve("--kv-cache-memory", "300MiB"), quiet))
        prometheus = stack.enter_context(scraping(url))
        started = time.monotonic()
        with load(url, users, prompt_words) as threads:
            while sum(user.ended for user in threads) < requests:
                time.sleep(1)
                if not all(user.is_alive() for user in threads):
                    sys.exit("a request failed")
            empty = report(prometheus, int(time.monotonic() - started))
    if empty:
        sys.exit(f"without data: {', '.join(empty)}")


@contextlib.contextmanager
def scraping(url: str) -> Iterator[str]:
    """Prometheus with the repository's configuration, pointed at one server; gives its URL."""
    config = yaml.safe_load((CONFIG / "prometheus.yml").read_text())
    config["global"]["scrape_interval"] = "1s"
    [job] = config["scrape_configs"]
    del job["dns_sd_configs"]
    job["static_configs"] = [{"targets": [url.removeprefix("http://")]}]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "prometheus.yml").write_text(yaml.safe_dump(config))
        shutil.copy(CONFIG / "rules.yml", folder)
        command = [
            "prometheus",
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/data",
            "--web.listen-address=127.0.0.1:{port}",
            "--log.level=warn",
        ]
        with running(command, health="/-/ready") as (address, _):
            yield address


@contextlib.contextmanager
def load(url: str, users: int, words: int) -> Iterator[list[User]]:
    """Requests of all policies from several users until the block ends."""
    threads = [User(url, number, words) for number in range(users)]
    for thread in threads:
        thread.start()
    try:
        yield threads
    finally:
        for thread in threads:
            thread.over = True
        for thread in threads:
            thread.join()


class User(threading.Thread):
    """Sends request after request, each about another part of the text.

    Attributes:
        ended: requests answered.
        over: set to make the request in flight the last one.
    """

    def __init__(self, url: str, number: int, words: int):
        super().__init__()
        self.ended = 0
        self.over = False
        self._url = url
        self._number = number
        self._words = words

    def run(self) -> None:
        """Sends requests until told to stop."""
        draw, text = random.Random(self._number), documentation_text().split()
        with httpx.Client(base_url=self._url, timeout=600) as client:
            while not self.over:
                start = draw.randrange(len(text) - self._words)
                body = {
                    "prompt": " ".join(text[start : start + self._words]),
                    "max_tokens": 70,
                    "ignore_eos": True,
                    "kv": CONTROLS[(self._number + self.ended) % len(CONTROLS)],
                }
                answer = client.post("/v1/completions", json=body)
                if answer.status_code != 200:
                    raise RuntimeError(answer.text)
                self.ended += 1


def report(prometheus: str, window: int) -> list[str]:
    """Prints what each panel's queries return over the last `window` seconds; gives the empty panels."""
    dashboard = json.loads(DASHBOARD.read_text())
    values = variables(prometheus, dashboard, window)
    empty = []
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            series, points, last = evaluate(prometheus, fill(target["expr"], values), window)
            name = f"{panel['title']} {target['refId']}"
            print(f"{name:<36} {series:>3} series {points:>5} points   {last}")
            if not points:
                empty.append(name)
    print(f"{sum('targets' in panel for panel in dashboard['panels'])} panels, {len(empty)} queries empty")
    return empty


def variables(prometheus: str, dashboard: dict[str, Any], window: int) -> dict[str, str]:
    """The dashboard's template variables as Grafana would fill them in, all values selected."""
    values = {"__rate_interval": f"{window // 2}s"}
    for variable in dashboard["templating"]["list"]:
        if variable["type"] != "query":
            continue
        query = fill(variable["definition"], values).removeprefix("label_values(").removesuffix(")")
        selector, label = query.rsplit(", ", 1)
        found = api(prometheus, f"label/{label}/values", **{"match[]": selector})
        print(f"${variable['name']}: {', '.join(found)}")
        values[variable["name"]] = "|".join(found) if variable["multi"] else found[0]
    return values


def fill(query: str, values: dict[str, str]) -> str:
    """A query with the variables replaced."""
    for name, value in values.items():
        query = query.replace(f"${name}", value)
    return query


def evaluate(prometheus: str, query: str, window: int) -> tuple[int, int, str]:
    """Series, finite points and the last values of a query over the last `window` seconds."""
    now = time.time()
    result = api(prometheus, "query_range", query=query, start=now - window / 2, end=now, step=2)
    finite = [[float(v) for _, v in series["values"] if math.isfinite(float(v))] for series in result]
    last = ", ".join(f"{points[-1]:.4g}" for points in finite[:6] if points)
    return len(result), sum(map(len, finite)), last


def api(prometheus: str, path: str, **parameters: Any) -> Any:
    """The data of an answer of Prometheus' HTTP API."""
    answer = httpx.get(f"{prometheus}/api/v1/{path}", params=parameters, timeout=30)
    if answer.status_code != 200:
        raise RuntimeError(f"{parameters}: {answer.text}")
    data = answer.json()["data"]
    return data["result"] if isinstance(data, dict) else data


app = script(__doc__, main)

if __name__ == "__main__":
    app()
