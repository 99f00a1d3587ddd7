"""The first minutes on a GPU: phase by phase, each in a child of its own with a limit of its own.

    python benchmarks/gpu/first.py --out report env tests policies kernels decode prefill question peer
    python benchmarks/gpu/first.py --out report --model smollm2-135m-instruct real server sanitizer

An illegal access, a hang or a crash costs its phase alone: the parent imports torch and triton once, never
touches the GPU, and forks. REPORT/first.jsonl gets a line as soon as it is known, REPORT/first.md the tables
with the card's name. --cpu runs the same phases on small shapes under Triton's interpreter, to show that they
work; its times mean nothing.

Needs torch >= 2.11 with CUDA and triton >= 3.6; `tests` needs pytest, `peer` and `real` transformers,
`server` all that curkv needs, `sanitizer` compute-sanitizer of the CUDA toolkit.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

if "--cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

from phases import PHASES, Place, Row

from curkv.bench.script import script
from curkv.models.loading.built_in import DEFAULT_MODEL
from curkv.tables import table

LIMITS = {
    "env": 40, "tests": 90, "policies": 90, "kernels": 60, "decode": 150, "prefill": 100,
    "question": 40, "peer": 60, "real": 120, "server": 75, "sanitizer": 60,
}  # fmt: skip
"""Seconds that a phase may take on a GPU."""
SLOWER = 5
"""How much longer it may take without one."""


class Log:
    """Rows of all phases, written as they come."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._started = folder, time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        self._lines = folder / "first.jsonl"
        self._lines.write_text("")

    def write(self, phase: str, row: Row) -> None:
        """Adds a row."""
        at = round(time.monotonic() - self._started, 1)
        line = json.dumps({"phase": phase, "at": at} | row, default=str)
        print(line[:240], flush=True)
        with self._lines.open("a") as file:
            file.write(line + "\n")

    def report(self) -> None:
        """Writes the tables."""
        rows = [json.loads(line) for line in self._lines.read_text().splitlines()]
        (self._folder / "first.md").write_text("\n\n".join(_tables(rows)) + "\n")


def _tables(rows: list[Row]) -> Iterator[str]:
    for phase in dict.fromkeys(row["phase"] for row in rows):
        yield f"## {phase}"
        of_phase = [
            {k: v for k, v in row.items() if k not in ("phase", "at")}
            for row in rows
            if row["phase"] == phase
        ]
        names = list(dict.fromkeys(name for row in of_phase for name in row))
        yield table(names, [[_cell(row.get(name, "")) for name in names] for row in of_phase])


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "/").replace("\n", " ")


def run_phase(name: str, place: Place, log: Log, limit: float) -> Row:
    """Runs a phase in a child; how long that took and how it ended."""
    started, child = time.monotonic(), os.fork()
    if child == 0:
        os.setsid()
        os._exit(_in_child(name, place, log))
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            ended = "done" if status == 0 else f"status {os.waitstatus_to_exitcode(status)}"
            break
        if time.monotonic() - started > limit:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            ended = f"killed after {limit:.0f} s"
            break
        time.sleep(0.05)
    return {"name": name, "seconds": round(time.monotonic() - started, 1), "ended": ended}


def _in_child(name: str, place: Place, log: Log) -> int:
    try:
        for row in PHASES[name](place):
            log.write(name, row)
    except BaseException as error:
        log.write(name, {"FAILED": repr(error)[:500], "where": traceback.format_exc()[-2500:]})
        return 1
    finally:
        sys.stdout.flush()
    return 0


def main(
    phases: Annotated[list[str], typer.Argument(help=f"Of {', '.join(LIMITS)}.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder of the report.")],
    model: Annotated[str, typer.Option(help="Real model, for `real` and `server`.")] = DEFAULT_MODEL,
    seconds: Annotated[float, typer.Option(help="For all phases; those that do not fit are left out.")] = 900,
    cpu: Annotated[bool, typer.Option("--cpu", help="Small shapes, under Triton's interpreter.")] = False,
) -> None:
    """Runs phases and reports."""
    unknown = [name for name in phases if name not in PHASES]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}; there are {', '.join(PHASES)}", param_hint="phases")
    place, log, started, failed = (
        Place("cpu" if cpu else "cuda", out, model),
        Log(out),
        time.monotonic(),
        False,
    )
    for name in phases:
        left = seconds - (time.monotonic() - started)
        limit = min(LIMITS[name] * (SLOWER if cpu else 1), left - 5)
        row = run_phase(name, place, log, limit) if limit > 10 else {"name": name, "ended": "no time left"}
        log.write("phases", row)
        failed |= row["ended"] != "done"
    log.report()
    if failed:
        raise typer.Exit(1)


app = script(__doc__, main)

if __name__ == "__main__":
    app()
