"""Tables of the task "questions": of what the full cache answers, what is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from curkv.evaluation.measures import QUESTIONS, SCORE, cell, group
from curkv.evaluation.records import Record, SampleKey
from curkv.evaluation.statistics import mcnemar, paired_difference, proportion
from curkv.tables import table

SAME = 0.05
"""Nats per token up to which an answer counts as likely as with the full cache."""


def questions_tables(records: Sequence[Record]) -> list[str]:
    """Markdown for each protocol and length; nothing without such records."""
    found = [record for record in records if record.task == QUESTIONS]
    if not found:
        return []
    parts = ["## Questions about texts of several kinds", _full(found)]
    right = {(record.sample, record.question) for record in found if not record.budget and record.score}
    kept = [record for record in found if record.budget and (record.sample, record.question) in right]
    for (protocol, length), cells in group(kept, lambda r: (r.protocol, r.length)).items():
        where = f"question {protocol}, {length} tokens"
        parts.append(f"### Of what the full cache answers, {where}\n\n{_all_kinds(cells)}")
        whole = {(r.sample, r.question): r for r in found if not r.budget and r.protocol == protocol}
        parts.append(f"### Lost answers, {where}\n\n{_lost(cells, whole)}")
        for budget, of_budget in group(cells, lambda r: r.budget).items():
            parts.append(f"### By kind of text, {where}, {budget} kept\n\n{_by_kind(of_budget)}")
        if protocol == "hidden":
            parts.append(f"### Contexts of which every question is answered, {where}\n\n{_whole(cells)}")
    return parts


def _full(records: Sequence[Record]) -> str:
    full = {(r.sample, r.question): r for r in records if not r.budget}
    by_kind = group(full.values(), lambda r: (r.corpus, r.length))
    rows = [
        [f"`{kind}`", str(n), cell(found, SCORE), str(len(found))] for (kind, n), found in by_kind.items()
    ]
    return "What the full cache answers; all else is of these.\n\n" + table(
        ["text", "tokens", "answered", "questions"], rows
    )


def _all_kinds(records: Sequence[Record]) -> str:
    """Policies by budgets, and what each differs from the first one by."""
    budgets = _budgets(records)
    cells = group(records, lambda r: (r.policy, r.budget))
    policies = list(dict.fromkeys(record.policy for record in records))
    rows = []
    for policy in policies:
        row = [f"`{policy}`"]
        for budget in budgets:
            found, first = cells.get((policy, budget), []), cells.get((policies[0], budget), [])
            row.append(cell(found, SCORE) + _against(found, first) if found else "")
        rows.append([*row, str(max(len(cells.get((policy, budget), [])) for budget in budgets))])
    head = table(["policy", *(f"{budget} kept" for budget in budgets), "n"], rows)
    note = (
        "the difference in points over the same questions, its bootstrap interval over contexts, McNemar's p"
    )
    return f"{head}\n\nBehind intervals, against `{policies[0]}`: {note}."


def _against(records: Sequence[Record], first: Sequence[Record]) -> str:
    """The paired difference to another policy; "" to itself."""
    other = {(r.sample, r.question): r.score or 0.0 for r in first}
    pairs = [(r, other[r.sample, r.question]) for r in records if (r.sample, r.question) in other]
    if not pairs or records[0].policy == first[0].policy:
        return ""
    clusters = group(pairs, lambda pair: pair[0].sample)
    found = paired_difference([[(r.score or 0.0) - s for r, s in some] for some in clusters.values()])
    worse, better = (sum((r.score or 0.0) * sign < s * sign for r, s in pairs) for sign in (1, -1))
    change = "/".join(f"{100 * value:+.0f}" for value in (found.low, found.high))
    return f"; {100 * found.mean:+.0f} ({change}), p {mcnemar(worse, better):.2g}"


def _lost(records: Sequence[Record], whole: Mapping[tuple[SampleKey, str], Record]) -> str:
    """How many answers are lost, and how many of these although the right one is as likely as before."""
    budgets, rows = _budgets(records), []
    for policy, found in group(records, lambda r: r.policy).items():
        row = [f"`{policy}`"]
        for budget in budgets:
            own = [r for r in found if r.budget == budget]
            rises = [(r.nll or 0.0) - (whole[r.sample, r.question].nll or 0.0) for r in own if not r.score]
            row.append(f"{len(rises)} of {len(own)}, {sum(rise <= SAME for rise in rises)} as likely")
        rows.append(row)
    note = (
        f"As likely: the NLL per token of the full cache's answer rises by {SAME} at most, so that greedy "
        "decoding took another word at a near tie."
    )
    return f"{table(['policy', *(f'{budget} kept' for budget in budgets)], rows)}\n\n{note}"


def _by_kind(records: Sequence[Record]) -> str:
    kinds = sorted({record.corpus for record in records})
    counts = {kind: len({(r.sample, r.question) for r in records if r.corpus == kind}) for kind in kinds}
    rows = []
    for policy, found in group(records, lambda r: r.policy).items():
        by_kind = group(found, lambda r: r.corpus)
        rows.append([f"`{policy}`", *(cell(by_kind.get(kind, []), SCORE) for kind in kinds)])
    return table(["policy", *(f"{kind} (n {counts[kind]})" for kind in kinds)], rows)


def _whole(records: Sequence[Record]) -> str:
    budgets, rows = _budgets(records), []
    for policy, found in group(records, lambda r: r.policy).items():
        row = [f"`{policy}`"]
        for budget in budgets:
            contexts = group((r for r in found if r.budget == budget), lambda r: r.sample).values()
            whole = proportion([min(r.score or 0.0 for r in context) for context in contexts])
            row.append(f"{whole.mean:.0%} [{whole.low:.0%}, {whole.high:.0%}]")
        rows.append([*row, str(len({r.sample for r in found}))])
    return table(["policy", *(f"{budget} kept" for budget in budgets), "contexts"], rows)


def _budgets(records: Sequence[Record]) -> list[str]:
    return sorted(
        {r.budget for r in records}, key=lambda b: -float(b.rstrip("%")) if b.endswith("%") else 0.0
    )
