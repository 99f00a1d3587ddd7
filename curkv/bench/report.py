"""Measurements as tables, plots and JSON lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curkv import tables
from curkv.bench.measurement import Measurement
from curkv.bench.workload import Workload

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Figure:
    """A column of the table.

    Attributes:
        name: with the unit.
        value: takes it from a measurement.
        format: of the number.
        better: whether "more" or "less" of it is better; it is then compared and plotted.
    """

    name: str
    value: Callable[[Measurement], float | None]
    format: str
    better: str | None = None


FIGURES = [
    Figure("TTFT s", lambda m: m.ttft, ".2f"),
    Figure("later TTFT s", lambda m: m.later_ttft, ".3f", "less"),
    Figure("ITL p50 ms", lambda m: m.itl_p50 * 1e3, ".0f"),
    Figure("ITL p99 ms", lambda m: m.itl_p99 * 1e3, ".0f"),
    Figure("prefill tok/s", lambda m: m.prefill_rate, ".0f", "more"),
    Figure("decode tok/s", lambda m: m.decode_rate, ".1f", "more"),
    Figure("kept", lambda m: m.kept_ratio, ".0%"),
    Figure("peak MiB", lambda m: m.peak_bytes and m.peak_bytes / 2**20, ".0f", "less"),
]


def table(results: Sequence[Measurement], references: Sequence[str]) -> str:
    """Lays measurements out as Markdown.

    Args:
        results: One per workload and contender.
        references: Contenders whose best value the others' are compared with: above 1x is better than that.
    """
    columns = [figure for figure in FIGURES if any(figure.value(m) is not None for m in results)]
    header = ["requests x prompt + new", "contender", *(figure.name for figure in columns)]
    rows = []
    for m in results:
        others = [o for o in results if o.workload == m.workload and o.contender in references]
        rows.append([str(m.workload), m.contender, *(_cell(figure, m, others) for figure in columns)])
    return tables.table(header, rows)


def _cell(figure: Figure, m: Measurement, references: Sequence[Measurement]) -> str:
    value = figure.value(m)
    if value is None:
        return "-"
    known = [v for r in references if (v := figure.value(r))]
    if figure.better is None or not known:
        return f"{value:{figure.format}}"
    ratio = value / max(known) if figure.better == "more" else min(known) / value
    return f"{value:{figure.format}} ({ratio:.2f}x)"


def plot(results: Sequence[Measurement], path: Path) -> None:
    """Draws a row of panels per workload, a bar per contender in each.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure as Picture

    compared = [figure for figure in FIGURES if figure.better and any(figure.value(m) for m in results)]
    compared.sort(key=lambda figure: sum(not figure.value(m) for m in results))  # names stand at the first
    workloads = list(dict.fromkeys(m.workload for m in results))
    names = dict.fromkeys(m.contender for m in results)
    colours = dict(zip(names, cycle(map(colormaps["tab20"], range(20))), strict=False))
    picture = Picture((4 * len(compared), 2.6 * len(workloads)), layout="constrained")
    axes = picture.subplots(len(workloads), len(compared), squeeze=False)
    for row, workload in zip(axes, workloads, strict=True):
        found = [m for m in results if m.workload == workload]
        for axis, figure in zip(row, compared, strict=True):
            _bars(axis, figure, found, colours)
        row[0].set_title(f"{workload}", loc="left", x=-0.8, fontsize="medium", fontweight="bold")
    for row in axes:
        for axis in row[1:]:
            axis.set_yticklabels([])
    picture.savefig(path, dpi=110)


def _bars(axis: Axes, figure: Figure, results: Sequence[Measurement], colours: dict[str, Any]) -> None:
    names = [m.contender for m in results]
    values = [figure.value(m) or 0.0 for m in results]
    axis.set_visible(any(values))
    bars = axis.barh(names, values, color=[colours[name] for name in names])
    axis.invert_yaxis()
    axis.margins(x=0.2)
    axis.spines[["top", "right"]].set_visible(False)
    axis.bar_label(bars, [f"{v:{figure.format}}" if v else "-" for v in values], padding=2, fontsize="small")
    axis.set_title(f"{figure.name}, {figure.better} is better", fontsize="small")


def append(path: Path, repeat: int, measurement: Measurement) -> None:
    """Adds a line to a file of measurements."""
    with path.open("a") as file:
        file.write(json.dumps({"repeat": repeat, **asdict(measurement)}) + "\n")


def read(path: Path) -> dict[tuple[int, Workload, str], Measurement]:
    """The measurements of a file that may be missing, by repeat, workload and contender."""
    results = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        record = json.loads(line)
        repeat = record.pop("repeat")
        found = Measurement(**record | {"workload": Workload(**record["workload"])})
        results[repeat, found.workload, found.contender] = found
    return results
