"""Servers as processes of this machine: started, waited for, stopped; memory and processor time they take."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import httpx
import psutil

Process = subprocess.Popen[bytes]


def curkv_serve(*options: str) -> list[str]:
    """The command that starts this installation's server, for `running`."""
    return [sys.executable, "-m", "curkv.cli", "serve", "--port", "{port}", *options]


@contextmanager
def running(
    command: Sequence[str],
    log: IO[str] | None = None,
    environment: Mapping[str, str] | None = None,
    health: str = "/health",
) -> Iterator[tuple[str, Process]]:
    """Starts a server and stops it afterwards.

    Args:
        command: `{port}` in it becomes a free port of this machine.
        log: where the server writes; None drops what it says and shows its errors.
        environment: its variables; None passes this process' on.
        health: a path that answers 200 once the server takes requests.

    Yields:
        The server's URL and its process, when it answers.

    Raises:
        RuntimeError: it ended instead.
    """
    port = free_port()
    arguments = [argument.replace("{port}", str(port)) for argument in command]
    process = subprocess.Popen(arguments, stdout=log or subprocess.DEVNULL, stderr=log, env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        if not wait_for(url + health, lambda: process.poll() is None):
            raise RuntimeError(f"{process.args!r} ended with status {process.returncode}")
        yield url, process
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(url: str, still_starting: Callable[[], bool] = lambda: True) -> bool:
    """Waits until a URL answers 200; whether it did before it was no longer worth waiting."""
    with httpx.Client(timeout=5) as client:  # one, since to make it takes as long as the sleep
        while still_starting():
            with suppress(httpx.TransportError):
                if client.get(url).status_code == 200:
                    return True
            time.sleep(0.05)
    return False


def peak_bytes(pid: int) -> int:
    """Most memory that a process and its children have held, each at its own time."""
    process = psutil.Process(pid)
    return sum(_peak_bytes(member.pid) for member in [process, *process.children(recursive=True)])


def _peak_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has taken."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)
