"""Plots of an evaluation: quality over budget, and where in the context a needle is still found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curkv.evaluation.measures import ANSWER_NLL, KL, QUESTIONS, SCORE, Measure, answered, estimate, group
from curkv.evaluation.records import Record
from curkv.evaluation.tasks import TASKS
from curkv.evaluation.tasks.real_text import DEPTHS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def write_plots(records: Sequence[Record], directory: Path) -> list[Path]:
    """Draws what the records allow.

    Args:
        records: Of one or more runs.
        directory: Where the images go; it exists.

    Returns:
        The images.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    usable = [record for record in answered(records) if not TASKS[record.task].repeats]
    continuations = [record for record in records if record.kl is not None]
    paths = []
    for protocol, found in group(usable, lambda record: record.protocol).items():
        paths.append(_quality(found, [SCORE, ANSWER_NLL], directory / f"quality-{protocol}.png"))
    if continuations:
        paths.append(_quality(continuations, [KL], directory / "quality-continuation.png"))
    asked = [record for record in records if record.task == QUESTIONS and record.budget]
    for protocol, found in group(asked, lambda record: record.protocol).items():
        paths.append(_quality(found, [SCORE], directory / f"questions-{protocol}.png"))
    needles = [record for record in usable if record.task == "needle"]
    for protocol, found in group(needles, lambda record: record.protocol).items():
        paths.append(_heat_maps(found, directory / f"needle-{protocol}.png"))
    return paths


def _quality(records: Sequence[Record], measures: Sequence[Measure], path: Path) -> Path:
    """A panel per measure: its mean over the share kept, a line per policy, the full cache dashed."""
    sources = {record.source for record in records}
    figure, axes = _figure(1, len(measures), 6, 4.5)
    for measure, axis in zip(measures, axes[0], strict=True):
        for (policy, source), found in group(records, lambda r: (r.policy, r.source)).items():
            _line(axis, policy, policy if len(sources) == 1 else f"{policy} ({source})", found, measure)
        axis.set(xlabel="share of the prompt kept", ylabel=measure.name, xscale="log")
        shares = sorted({round(record.kept_ratio, 3) for record in records if record.budget})
        axis.set_xticks(shares, [f"{share:.4g}" for share in shares])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][-1].legend(fontsize="small")
    return _save(figure, path)


def _line(axis: Axes, policy: str, label: str, records: Sequence[Record], measure: Measure) -> None:
    by_budget = group(records, lambda record: record.budget).values()
    points = []
    for found in by_budget:
        result = estimate(found, measure)
        if result is not None:
            points.append((sum(record.kept_ratio for record in found) / len(found), result))
    points.sort(key=lambda point: point[0])
    if policy == "full":
        for _, result in points:
            axis.axhline(result.mean, color="black", linestyle="--", linewidth=1, label=label)
        return
    means = [result.mean for _, result in points]
    errors = [
        [result.mean - result.low for _, result in points],
        [result.high - result.mean for _, result in points],
    ]
    axis.errorbar([kept for kept, _ in points], means, errors, marker="o", capsize=2, label=label)


def _heat_maps(records: Sequence[Record], path: Path) -> Path:
    """A map per policy and budget: mean score by length and depth."""
    maps = group(records, lambda record: (record.policy, record.budget))
    lengths = sorted({record.length for record in records})
    columns = min(4, len(maps))
    figure, axes = _figure(-(-len(maps) // columns), columns, 3, 3)
    panels = [axis for row in axes for axis in row]
    for axis, ((policy, budget), found) in zip(panels, maps.items(), strict=False):
        cells = group(found, lambda record: (_row(record), record.length))
        grid = [[_mean_score(cells.get((row, length), [])) for length in lengths] for row in range(DEPTHS)]
        axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axis.set_title(f"{policy} {budget}", fontsize="small")
        axis.set_xticks(range(len(lengths)), map(str, lengths))
        axis.set_yticks(range(0, DEPTHS, 3), [f"{row / DEPTHS:.0%}" for row in range(0, DEPTHS, 3)])
        axis.set(xlabel="tokens", ylabel="depth")
    for axis in panels[len(maps) :]:
        axis.axis("off")
    return _save(figure, path)


def _row(record: Record) -> int:
    return min(DEPTHS - 1, int((record.depth or 0) * DEPTHS))


def _mean_score(records: Sequence[Record]) -> float:
    result = estimate(records, SCORE)
    return result.mean if result is not None else float("nan")


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, Any]:
    """A figure with rows x columns panels, each of that size in inches; it needs no display."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError("plots need matplotlib: pip install 'curkv[eval]'") from None
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    return path
