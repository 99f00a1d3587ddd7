"""What a server loses to another busy process, and when it may use one core only.

    python benchmarks/shared_cores.py
    python benchmarks/shared_cores.py --peer "llama.cpp=benchmarks/peers/llama.sh serve {port}" \\
        --peer "OpenVINO=benchmarks/peers/openvino.sh serve {port}"

Seconds for a prompt of 1,000 tokens, and for one of 100 with 64 generated: alone on the machine; beside a
busy process for each --busy; bound to one core while it runs. The conditions take turns, and the medians are
printed with their ratio to being alone. The column of one core is to be compared with the row of one thread.
"""

from __future__ import annotations

import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from curkv.bench.client import seconds_for
from curkv.bench.process import curkv_serve, running
from curkv.bench.script import Model, script
from curkv.tables import head, line

WORKLOADS = ((1000, 1), (100, 64))
"""Tokens of the prompt, and tokens generated."""


def measure(
    model: Model = "smollm2-135m-instruct",
    weights: Annotated[str, typer.Option(help="As for `curkv serve`.")] = "int8",
    peer: Annotated[list[str] | None, typer.Option(help="NAME=COMMAND; with {port}.")] = None,
    busy: Annotated[int, typer.Option(help="Busy processes beside it.")] = 1,
    repeats: Annotated[int, typer.Option(help="Of each measurement.")] = 5,
) -> None:
    """Measures curkv on all cores and on one thread, and the peers."""
    curkv = curkv_serve("--model", model, "--weights", weights, "--prefix-cache-memory", "0")
    contenders = {"curkv": curkv, "curkv, one thread": [*curkv, "--threads", "1"]}
    for text in peer or ():
        name, started_by = text.split("=", 1)
        contenders[name] = shlex.split(started_by)
    print(head(["server", "tokens", "alone s", f"{busy} busy beside", "one core"]))
    for name, command in contenders.items():
        with running(command) as (url, process):
            for prompt, generated in WORKLOADS:
                medians = conditions(url, process.pid, prompt, generated, busy, repeats)
                alone = medians[0]
                others = [f"{seconds:.3f} ({seconds / alone:.2f}x)" for seconds in medians[1:]]
                print(line([name, f"{prompt} + {generated}", f"{alone:.3f}", *others]), flush=True)


def conditions(url: str, pid: int, prompt: int, generated: int, busy: int, repeats: int) -> list[float]:
    """The median seconds alone, beside busy processes, and on one core."""
    found: list[list[float]] = [[], [], []]
    seconds_for(url, prompt, generated, 0)
    for number in range(1, 3 * repeats, 3):
        found[0].append(seconds_for(url, prompt, generated, number))
        with neighbours(busy):
            found[1].append(seconds_for(url, prompt, generated, number + 1))
        with bound(pid):
            found[2].append(seconds_for(url, prompt, generated, number + 2))
    return [statistics.median(seconds) for seconds in found]


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Processes that do nothing and never wait."""
    processes = [subprocess.Popen([sys.executable, "-c", "while 1: pass"]) for _ in range(count)]
    time.sleep(0.5)
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextmanager
def bound(pid: int) -> Iterator[None]:
    """Binds a process to the first of its cores; it has two seconds to notice."""
    cores = os.sched_getaffinity(pid)
    try:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), {min(cores)})
        time.sleep(2)
        yield
    finally:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), cores)
        time.sleep(2)


app = script(__doc__, measure)

if __name__ == "__main__":
    app()
