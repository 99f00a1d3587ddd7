"""Quantities that reports and plots show, and which records they count."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from curkv.evaluation.records import Record
from curkv.evaluation.statistics import Estimate, mean, proportion

QUESTIONS = "questions"
"""The task of which single questions count."""

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
SERIES = Measure("items before the first wrong one", lambda record: record.score, proportion, "{:.0%}")
KL = Measure("KL(full || policy) per token", lambda record: record.kl, mean, "{:.3f}")
TOP1 = Measure("top-1 agreement", lambda record: record.top1, proportion, "{:.1%}")


def group(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Sorts records into groups, in order of appearance."""
    groups: dict[K, list[T]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(groups)


def own_answers(record: Record) -> bool:
    """Whether only what the full cache answers counts in its task, question by question."""
    return record.task == QUESTIONS or record.protocol == "decoding"


def answered(records: Iterable[Record]) -> list[Record]:
    """Those of tasks with a question that the model can do with the full cache, all together."""
    by_task = group(
        (r for r in records if r.score is not None and not own_answers(r)),
        lambda r: (r.source, r.task, r.length),
    )
    return [record for found in by_task.values() if can_do(found) for record in found]


def can_do(records: Iterable[Record]) -> bool:
    """Whether the full cache reaches `CAN_DO` in a task's records."""
    scores = [r.score for r in records if not r.budget and r.score is not None]
    return bool(scores) and sum(scores) / len(scores) >= CAN_DO


def estimate(records: Iterable[Record], measure: Measure) -> Estimate | None:
    """Mean of a measure over records; None if none has it."""
    values = [value for record in records if (value := measure.value(record)) is not None]
    return measure.estimate(values) if values else None


def cell(records: Sequence[Record], measure: Measure) -> str:
    """Mean and interval of a measure in a table; "" if no record has it."""
    found = estimate(records, measure)
    if found is None:
        return ""
    mean, low, high = (measure.format.format(value) for value in (found.mean, found.low, found.high))
    return f"{mean} [{low}, {high}]" if found.samples > 1 else mean
