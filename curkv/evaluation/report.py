"""Markdown tables of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from curkv.evaluation.measures import (
    ANSWER_NLL,
    KL,
    SCORE,
    SERIES,
    TEXT_NLL,
    TOP1,
    Measure,
    answered,
    can_do,
    cell,
    group,
    own_answers,
)
from curkv.evaluation.questions_report import questions_tables
from curkv.evaluation.records import Record
from curkv.evaluation.tasks import TASKS
from curkv.tables import table


def markdown(records: Sequence[Record], plots: Sequence[Path] = ()) -> str:
    """Writes the report.

    Args:
        records: Of one or more runs.
        plots: Images to show, in the same directory.
    """
    parts = ["# What eviction costs in quality"]
    for source, found in group(records, lambda record: record.source).items():
        parts += [f"Source: {source}. Intervals are 95 %; n counts samples.", *_tasks(found)]
        parts += questions_tables(found)
        parts += _series([record for record in found if record.protocol == "decoding"])
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
                estimates = [cell(by_source[source], measure) for source in sources]
                rows.append([f"`{policy}`", kept, *estimates, str(len(by_source[sources[0]]))])
            title = f"### {measure.name}, {protocol}, {length} tokens"
            parts.append(f"{title}\n\n{table(['policy', 'kept', *sources, 'n'], rows)}")
    return parts


def _tasks(records: Sequence[Record]) -> list[str]:
    """Says which tasks the model can do with the full cache."""
    full = [r for r in records if not r.budget and r.score is not None and not own_answers(r)]
    rows = []
    for (task, length, protocol), found in group(full, lambda r: (r.task, r.length, r.protocol)).items():
        counts = can_do(r for r in records if (r.task, r.length) == (task, length))
        verdict = "yes" if counts else "no: the model cannot do it with the full cache"
        cells = [f"`{task}`", str(length), protocol, cell(found, SCORE), cell(found, ANSWER_NLL)]
        rows.append([*cells, str(len(found)), verdict])
    header = ["task", "tokens", "question", "exact match", "answer NLL", "n", "counts"]
    return ["## The full cache\n\n" + table(header, rows)] if rows else []


def _series(records: Sequence[Record]) -> list[str]:
    """A table for each length: policies by tasks and decode budgets."""
    parts = []
    for length, found in group(records, lambda r: r.length).items():
        cells = group(found, lambda r: (r.policy, r.task, r.budget))
        tasks = list(dict.fromkeys(r.task for r in found))
        budgets = list(dict.fromkeys(r.budget for r in found if r.budget))
        columns = [(task, budget) for task in tasks for budget in budgets]
        rows = []
        for policy in dict.fromkeys(r.policy for r in found):
            own = [cells.get((policy, task, "" if policy == "full" else b), []) for task, b in columns]
            rows.append([f"`{policy}`", *(cell(some, SERIES) for some in own), str(max(map(len, own)))])
        header = ["policy", *(f"`{task}`, {budget} held" for task, budget in columns), "n"]
        parts.append(f"### {length} tokens\n\n{table(header, rows)}")
    note = (
        "Items before the first wrong one: `full` of all items, the others of those that the full cache has."
    )
    return [f"## Long answers under a decode budget\n\n{note}", *parts] if parts else []


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
        estimates = [cell(found, measure) for found in columns]
        rows.append([f"`{policy}`", *estimates, str(_samples(records, policy))])
    return table(["policy", *(f"{budget} kept" for budget in budgets), "n"], rows)


def _samples(records: Sequence[Record], policy: str) -> int:
    return len({(r.task, r.corpus, r.seed) for r in records if r.policy == policy})
