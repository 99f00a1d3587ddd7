"""Compiles every Triton kernel for real chips and holds it to gates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tqdm import tqdm

from curkv.kernels.costs import evaluate
from curkv.kernels.dispatch import triton_cases
from curkv.tables import table

if TYPE_CHECKING:
    from curkv.bench.aot import Call, Launch, Report, Target
    from curkv.kernels.spec import ModelShape

COSTS = {name: case.cost for _, name, case in triton_cases()}
"""Cost of every case of every operation, by its name."""

MAX_OVERHEAD = {"bfloat16": 1.1, "fp8": 1.2, "int8": 1.2, "int4": 1.35}
"""Bytes moved, as a multiple of the fewest possible, by the cache's format.

What is written beside the pages, float32 logits and energies, weighs more where these are small.
"""

BANDWIDTH = {"H100": 3.35e12, "A100": 2.039e12}
"""Bytes per second of the SXM cards with 80 GB (NVIDIA's data sheets)."""

TENSOR_FLOPS = {"H100": 990e12, "A100": 312e12}
"""Dense bfloat16 operations per second."""


def compile_all(models: list[ModelShape], targets: list[Target]) -> list[Entry]:
    """Compiles every operation as each model needs it, for each chip."""
    from curkv.bench import aot

    calls = [(model.name, t, call) for model in models for t in targets for call in aot.calls(model, t)]
    return [
        Entry(name, t, call, [(launch, aot.compile_launch(launch, t)) for launch in call.launches])
        for name, t, call in tqdm(calls, "compiling", unit="operation", disable=None)
    ]


@dataclass(frozen=True)
class Entry:
    """A call of an operation by one model's shapes, compiled for one chip."""

    model: str
    target: Target
    call: Call
    reports: list[tuple[Launch, Report]]


def failures(entry: Entry) -> Iterator[str]:
    """Say which gates an operation breaks."""
    from curkv.bench.aot import smallest_wide_loads

    for launch, report in entry.reports:
        where = f"{entry.model}, {entry.target.name}, {launch.name}{entry.call.label}"
        if report.spills:
            yield f"{where}: {report.spills} spills"
        if report.shared > entry.target.shared_per_program:
            yield f"{where}: {report.shared} bytes of shared memory"
        needed = smallest_wide_loads(launch)
        if report.wide_loads < needed or (needed and report.narrow_loads):
            yield f"{where}: {report.wide_loads} 16-byte and {report.narrow_loads} 2-byte loads of K and V"
        if launch.name == "paged_prefill_attention.attend" and not report.tensor_ops:
            yield f"{where}: no tensor-core instruction with 16-bit operands"
    cost = COSTS[entry.call.name]
    overhead = evaluate(cost.moved, entry.call.shapes) / evaluate(cost.minimum, entry.call.shapes)
    if overhead > MAX_OVERHEAD[entry.call.kv_dtype]:
        name = entry.call.name + entry.call.label
        yield f"{entry.model}, {name}: moves {overhead:.2f} times the bytes it must"


def kernel_table(entries: list[Entry]) -> str:
    """Markdown: one row for each kernel as a model needs it, one column for each chip.

    Of several variants of a kernel (as of `select.count`) the one with most registers is shown.
    """
    targets = list(dict.fromkeys(e.target.name for e in entries))
    reports: dict[tuple[str, str], dict[str, Report]] = {}
    for entry in entries:
        for launch, report in entry.reports:
            of_targets = reports.setdefault((entry.model, launch.name + entry.call.label), {})
            other = of_targets.setdefault(entry.target.name, report)
            of_targets[entry.target.name] = max(other, report, key=lambda r: r.registers)
    cells = {key: [_cell(of_targets.get(t)) for t in targets] for key, of_targets in reports.items()}
    return _table(["kernel", "models", *targets], sorted(cells.items(), key=lambda item: item[0][1]))


def _cell(report: Report | None) -> str:
    if report is None:  # fp8 is not for every chip
        return ""
    return (
        f"{report.registers}r {report.shared / 1024:.0f}K {report.occupancy:.0%}"
        f" {report.spills}s {report.wide_loads}w {report.tensor_ops}t"
    )


def cost_table(entries: list[Entry]) -> str:
    """Markdown: what each operation moves and computes as a model needs it, and the least time of both."""
    cells: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        shapes, cost = entry.call.shapes, COSTS[entry.call.name]
        moved, flops = evaluate(cost.moved, shapes), evaluate(cost.flops, shapes)
        overhead = moved / evaluate(cost.minimum, shapes)
        floors = [max(moved / BANDWIDTH[x], flops / TENSOR_FLOPS[x]) * 1e6 for x in BANDWIDTH]
        cells.setdefault(
            (entry.model, f"{entry.call.name}{entry.call.label}; n = {shapes['n']:,}"),
            [f"{moved / 1e6:.2f}", f"{overhead:.2f}", f"{flops / 1e9:.2f}", *(f"{x:.1f}" for x in floors)],
        )
    columns = ["MB", "x minimum", "GFLOP", *(f"{name} us" for name in BANDWIDTH)]
    return _table(["operation", "models", *columns], cells.items())


def _table(header: list[str], cells: Iterable[tuple[tuple[str, str], list[str]]]) -> str:
    """Markdown with one row for all models of which a name's cells are equal."""
    models: dict[tuple[str, ...], list[str]] = {}
    for (model, name), values in cells:
        models.setdefault((name, *values), []).append(model)
    rows = ([name, ", ".join(same), *values] for (name, *values), same in models.items())
    return table(header, rows)


def formula_table() -> str:
    """Markdown: bytes and FLOPs of each operation by formula."""
    header = ["operation", "bytes moved", "FLOPs", "read again from L2"]
    return table(header, ([name, f"`{c.moved}`", f"`{c.flops}`", c.again] for name, c in COSTS.items()))
