"""Tasks by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from curkv.evaluation.corpora import corpus_names
from curkv.evaluation.records import ProtocolName
from curkv.evaluation.tasks import real_text, ruler, series
from curkv.evaluation.tasks.base import MakeSample, Recipe, Sample
from curkv.evaluation.tasks.questions import questions
from curkv.evaluation.tasks.questions.texts import TEXTS


@dataclass(frozen=True)
class Task:
    """How samples of a task are made.

    Attributes:
        make: Makes a sample.
        group: What it is asked for with.
        corpora: What its context may be made from; none: it brings its own.
        repeats: Whether its haystack is one repeated sentence; such tasks are reported apart.
        protocol: The only one that it is measured under; None: those of tasks with a question.
    """

    make: MakeSample
    group: str
    corpora: tuple[str, ...] = ()
    repeats: bool = False
    protocol: ProtocolName | None = None


TASKS = {
    "needle": Task(real_text.needle, "real-text", corpus_names()),
    "qa_fact": Task(real_text.qa_fact, "real-text", corpus_names()),
    "qa_list": Task(real_text.qa_list, "real-text", corpus_names()),
    "qa_quote": Task(real_text.qa_quote, "real-text", corpus_names()),
    "continuation": Task(real_text.continuation, "real-text", corpus_names(), protocol="continuation"),
    "questions": Task(questions, "questions", tuple(TEXTS)),
    "copy": Task(series.copy, "series", protocol="decoding"),
    "counting": Task(series.counting, "series", protocol="decoding"),
    "state": Task(series.state, "series", protocol="decoding"),
    "niah_single_1": Task(ruler.niah_single_1, "ruler", repeats=True),
    "niah_multikey_2": Task(ruler.niah_multikey_2, "ruler"),
    "niah_multikey_3": Task(ruler.niah_multikey_3, "ruler"),
    "vt": Task(ruler.vt, "ruler", repeats=True),
    "cwe": Task(ruler.cwe, "ruler"),
    "fwe": Task(ruler.fwe, "ruler"),
}


def task_names(names: Iterable[str]) -> list[str]:
    """Resolves names of tasks and of groups: "real-text", "series", "ruler", "all".

    Raises:
        ValueError: A name is unknown.
    """
    groups: dict[str, list[str]] = {"all": list(TASKS)}
    for name, task in TASKS.items():
        groups.setdefault(task.group, []).append(name)
    names = list(names)
    unknown = [name for name in names if name not in groups and name not in TASKS]
    if unknown:
        raise ValueError(f"unknown task {unknown[0]}; there are {', '.join((*TASKS, *groups))}")
    return list(dict.fromkeys(task for name in names for task in groups.get(name, [name])))


def make_sample(recipe: Recipe, count_tokens: Callable[[str], int]) -> Sample:
    """Makes the sample of a recipe.

    Args:
        recipe: What is wanted.
        count_tokens: Counts a string's tokens for the model at hand.

    Raises:
        ValueError: The task does not fit into so few tokens.
    """
    return TASKS[recipe.task].make(recipe, count_tokens)
