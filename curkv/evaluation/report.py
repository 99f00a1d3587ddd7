"""Markdown tables of an evaluation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from curkv.evaluation.records import Record
from curkv.evaluation.statistics import Estimate, mean, proportion
from curkv.evaluation.tasks import TASKS
from curkv.tables import table

CAN_DO = 0.5
"""A task counts at a length if the full cache reaches this mean score, else the model cannot do it at all."""

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


@dataclass(frozen=True)
class Measure:
    """A quantity that tables and plots show.

    Attributes:
        name: For headings.
        value: Of a record; None if it has none.
        estimate: Mean and interval of values.
        format: Of a value.
    """

    name: str
    value: Callable[[Record], float | None]
    estimate: Callable[[Sequence[float]], Estimate]
    format: str


SCORE = Measure("exact match", lambda record: record.score, proportion, "{:.0%}")
ANSWER_NLL = Measure("NLL per token of the right answer", lambda record: record.nll, mean, "{:.3f}")
TEXT_NLL = Measure("NLL per token of the text that follows", lambda record: record.nll, mean, "{:.3f}")
KL = Measure("KL(full || policy) per token", lambda record: record.kl, mean, "{:.3f}")
TOP1 = Measure("top-1 agreement", lambda record: record.top1, proportion, "{:.1%}")


def group(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Sorts records into groups, in order of appearance."""
    groups: dict[K, list[T]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(groups)


def answered(records: Iterable[Record]) -> list[Record]:
    """Those of tasks with a question that the model can do with the full cache."""
    by_task = group((r for r in records if r.score is not None), lambda r: (r.source, r.task, r.length))
    return [record for found in by_task.values() if can_do(found) for record in found]


def can_do(records: Iterable[Record]) -> bool:
    """Whether the full cache reaches `CAN_DO` in a task's records."""
    scores = [r.score for r in records if not r.budget and r.score is not None]
    return bool(scores) and sum(scores) / len(scores) >= CAN_DO


def estimate(records: Iterable[Record], measure: Measure) -> Estimate | None:
    """Mean of a measure over records; None if none has it."""
    values = [value for record in records if (value := measure.value(record)) is not None]
    return measure.estimate(values) if values else None


def markdown(records: Sequence[Record], plots: Sequence[Path] = ()) -> str:
    """Writes the report.

    Args:
        records: Of one or more runs.
        plots: Images to show, in the same directory.
    """
    parts = ["# What eviction costs in quality"]
    for source, found in group(records, lambda record: record.source).items():
        parts += [f"Source: {source}. Intervals are 95 %; n counts samples.", _tasks(found)]
        usable = answered(found)
        varied = [record for record in usable if not TASKS[record.task].repeats]
        repeating = [record for record in usable if TASKS[record.task].repeats]
        parts += _tables("All tasks that count, varied text", varied, [SCORE, ANSWER_NLL])
        by_task = group(varied, lambda record: record.task)
        for task, of_task in by_task.items() if len(by_task) > 1 else ():
            parts += _tables(f"`{task}`", of_task, [SCORE, ANSWER_NLL])
        parts += _tables("Tasks with one repeated sentence", repeating, [SCORE, ANSWER_NLL])
        continuations = [record for record in found if record.kl is not None]
        parts += _tables("Continuation of real text", continuations, [KL, TOP1, TEXT_NLL])
    parts += _sources(records)
    parts += [f"![{plot.stem}]({plot.name})" for plot in plots]
    return "\n\n".join(parts) + "\n"


def _sources(records: Sequence[Record]) -> list[str]:
    """Tables of several sources beside each other, over the samples that all of them have."""
    sources = list(dict.fromkeys(record.source for record in records))
    if len(sources) == 1:
        return []
    counted = answered(records) + [record for record in records if record.kl is not None]
    variants = group(counted, lambda r: (r.task, r.corpus, r.length, r.seed, r.protocol, r.policy, r.budget))
    common = [r for found in variants.values() if len(found) == len(sources) for r in found]
    parts = ["## Sources beside each other"]
    for (protocol, length), found in group(common, lambda r: (r.protocol, r.length)).items():
        measures = [KL, TOP1, TEXT_NLL] if protocol == "continuation" else [SCORE, ANSWER_NLL]
        for measure in measures:
            rows = []
            for (policy, budget), cells in group(found, lambda r: (r.policy, r.budget)).items():
                by_source = group(cells, lambda r: r.source)
                kept = budget or "100%"
                estimates = [_cell(by_source[source], measure) for source in sources]
                rows.append([f"`{policy}`", kept, *estimates, str(len(by_source[sources[0]]))])
            title = f"### {measure.name}, {protocol}, {length} tokens"
            parts.append(f"{title}\n\n{table(['policy', 'kept', *sources, 'n'], rows)}")
    return parts


def _tasks(records: Sequence[Record]) -> str:
    """Says which tasks the model can do with the full cache."""
    full = [r for r in records if not r.budget and r.score is not None]
    rows = []
    for (task, length, protocol), found in group(full, lambda r: (r.task, r.length, r.protocol)).items():
        counts = can_do(r for r in records if (r.task, r.length) == (task, length))
        verdict = "yes" if counts else "no: the model cannot do it with the full cache"
        cells = [f"`{task}`", str(length), protocol, _cell(found, SCORE), _cell(found, ANSWER_NLL)]
        rows.append([*cells, str(len(found)), verdict])
    header = ["task", "tokens", "question", "exact match", "answer NLL", "n", "counts"]
    return "## The full cache\n\n" + table(header, rows)


def _tables(title: str, records: Sequence[Record], measures: Sequence[Measure]) -> list[str]:
    """A table for each protocol, length and measure: policies by budgets."""
    parts = []
    for (protocol, length), found in group(records, lambda r: (r.protocol, r.length)).items():
        where = f"{length} tokens" if protocol == "continuation" else f"question {protocol}, {length} tokens"
        parts += [
            f"### {title}: {measure.name}, {where}\n\n{_policies(found, measure)}" for measure in measures
        ]
    return [f"## {title}", *parts] if parts else []


def _policies(records: Sequence[Record], measure: Measure) -> str:
    budgets = list(dict.fromkeys(record.budget for record in records if record.budget))
    cells = group(records, lambda record: (record.policy, record.budget))
    rows = []
    for policy in dict.fromkeys(record.policy for record in records):
        columns = [cells.get((policy, "" if policy == "full" else budget), []) for budget in budgets]
        estimates = [_cell(found, measure) for found in columns]
        rows.append([f"`{policy}`", *estimates, str(_samples(records, policy))])
    return table(["policy", *(f"{budget} kept" for budget in budgets), "n"], rows)


def _samples(records: Sequence[Record], policy: str) -> int:
    return len({(r.task, r.corpus, r.seed) for r in records if r.policy == policy})


def _cell(records: Sequence[Record], measure: Measure) -> str:
    found = estimate(records, measure)
    if found is None:
        return ""
    mean, low, high = (measure.format.format(value) for value in (found.mean, found.low, found.high))
    return f"{mean} [{low}, {high}]" if found.samples > 1 else mean
