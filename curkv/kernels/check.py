"""`curkv kernels check`: compiles every Triton kernel for real chips and holds it to gates."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from curkv.kernels.costs import COSTS, evaluate

if TYPE_CHECKING:
    from curkv.kernels.aot import Call, Launch, Report, Target

MAX_OVERHEAD = 1.1
"""Bytes moved, as a multiple of the fewest possible."""

BANDWIDTH = {"H100": 3.35e12, "A100": 2.039e12}
"""Bytes per second of the SXM cards with 80 GB (NVIDIA's data sheets)."""

TENSOR_FLOPS = {"H100": 990e12, "A100": 312e12}
"""Dense bfloat16 operations per second."""

app = typer.Typer(no_args_is_help=True, help="The GPU kernels.")


@app.callback()
def _kernels() -> None:
    """Keep `check` a command of its own although it is the only one."""


@app.command()
def check(
    table: Annotated[bool, typer.Option(help="Print the table of docs/kernels.md.")] = True,
    model: Annotated[list[str] | None, typer.Option(help="Only these models.")] = None,
    target: Annotated[list[str] | None, typer.Option(help="Only these chips.")] = None,
) -> None:
    """Compile every kernel for sm_80, sm_90, sm_100 and gfx942; needs no GPU. Fails if a gate does."""
    os.environ.pop("TRITON_INTERPRET", None)
    from curkv.kernels import aot

    models = [m for m in aot.MODELS if not model or m.name in model]
    targets = [t for t in aot.TARGETS if not target or t.name in target]
    if not models or not targets:
        names = ", ".join([m.name for m in aot.MODELS] + [t.name for t in aot.TARGETS])
        raise typer.BadParameter(f"unknown model or target; there are {names}")
    entries = [
        Entry(m.name, t, call, [(launch, aot.compile_launch(launch, t)) for launch in call.launches])
        for m in models
        for t in targets
        for call in aot.calls(m, t)
    ]
    if table:
        for line in [*kernel_table(entries), "", *cost_table(entries)]:
            typer.echo(line)
    broken = [failure for entry in entries for failure in failures(entry)]
    for failure in broken:
        typer.echo(failure, err=True)
    typer.echo(
        f"{sum(len(e.reports) for e in entries)} kernels compiled, {len(broken)} gates broken", err=True
    )
    raise typer.Exit(1 if broken else 0)


@dataclass(frozen=True)
class Entry:
    """A call of an operation by one model's shapes, compiled for one chip."""

    model: str
    target: Target
    call: Call
    reports: list[tuple[Launch, Report]]


def failures(entry: Entry) -> Iterator[str]:
    """Say which gates an operation breaks."""
    from curkv.kernels.aot import smallest_wide_loads

    for launch, report in entry.reports:
        where = f"{entry.model}, {entry.target.name}, {launch.name}"
        if report.spills:
            yield f"{where}: {report.spills} spills"
        if report.shared > entry.target.shared_per_program:
            yield f"{where}: {report.shared} bytes of shared memory"
        needed = smallest_wide_loads(launch)
        if report.wide_loads < needed or (needed and report.narrow_loads):
            yield f"{where}: {report.wide_loads} 16-byte and {report.narrow_loads} 2-byte loads of K and V"
        if launch.name == "paged_prefill_attention.attend" and not report.tensor_ops:
            yield f"{where}: no tensor-core instruction"
    cost = COSTS[entry.call.name]
    overhead = evaluate(cost.moved, entry.call.shapes) / evaluate(cost.minimum, entry.call.shapes)
    if overhead > MAX_OVERHEAD:
        yield f"{entry.model}, {entry.call.name}: moves {overhead:.2f} times the bytes it must"


def kernel_table(entries: list[Entry]) -> list[str]:
    """Markdown: one row for each kernel as a model needs it, one column for each chip.

    Of several variants of a kernel (as of `select.find_thresholds`) the one with most registers is shown.
    """
    targets = list(dict.fromkeys(e.target.name for e in entries))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for entry in entries:
        for launch, report in entry.reports:
            cells = rows.setdefault((launch.name, entry.model), {})
            cells[entry.target.name] = max(cells.get(entry.target.name, ""), _cell(report), key=_registers)
    same: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (name, model), cells in rows.items():
        same.setdefault((name, tuple(cells[t] for t in targets)), []).append(model)
    lines = [
        f"| kernel | models | {' | '.join(targets)} |",
        "|---|---|" + "---|" * len(targets),
    ]
    for (name, cells_of), models in sorted(same.items()):
        lines.append(f"| {name} | {', '.join(models)} | {' | '.join(cells_of)} |")
    return lines


def _registers(cell: str) -> int:
    return int(cell.split("r")[0] or 0)


def _cell(report: Report) -> str:
    return (
        f"{report.registers}r {report.spills}s {report.shared / 1024:.0f}K {report.occupancy:.0%}"
        f" {report.wide_loads}w {report.tensor_ops}t"
    )


def cost_table(entries: list[Entry]) -> list[str]:
    """Markdown: bytes and FLOPs of each operation by formula, and the least time that they take."""
    lines = [
        "| model | operation | bytes moved | MB | x minimum | FLOPs | GFLOP | H100 | A100 | again from L2 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    seen = set()
    for entry in entries:
        shapes = entry.call.shapes
        key = entry.model, entry.call.name, shapes["n"]
        if key in seen:
            continue
        seen.add(key)
        cost = COSTS[entry.call.name]
        moved, flops = evaluate(cost.moved, shapes), evaluate(cost.flops, shapes)
        overhead = moved / evaluate(cost.minimum, shapes)
        floors = [max(moved / BANDWIDTH[x], flops / TENSOR_FLOPS[x]) * 1e6 for x in BANDWIDTH]
        lines.append(
            f"| {entry.model} | {entry.call.name}, n = {shapes['n']} | `{cost.moved}` | {moved / 1e6:.2f}"
            f" | {overhead:.2f} | `{cost.flops}` | {flops / 1e9:.2f}"
            f" | {floors[0]:.1f} us | {floors[1]:.1f} us | {cost.again} |"
        )
    return lines


if __name__ == "__main__":
    app()
