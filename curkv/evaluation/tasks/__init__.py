"""Tasks by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from curkv.evaluation.tasks import real_text, ruler
from curkv.evaluation.tasks.base import MakeSample, Recipe, Sample


@dataclass(frozen=True)
class Task:
    """How samples of a task are made.

    Attributes:
        make: Makes a sample.
        real_text: Whether its context is taken from a corpus.
        repeats: Whether its haystack is one repeated sentence; such tasks are reported apart.
    """

    make: MakeSample
    real_text: bool = False
    repeats: bool = False


TASKS = {
    "needle": Task(real_text.needle, real_text=True),
    "qa_fact": Task(real_text.qa_fact, real_text=True),
    "qa_list": Task(real_text.qa_list, real_text=True),
    "qa_quote": Task(real_text.qa_quote, real_text=True),
    "continuation": Task(real_text.continuation, real_text=True),
    "niah_single_1": Task(ruler.niah_single_1, repeats=True),
    "niah_multikey_2": Task(ruler.niah_multikey_2),
    "niah_multikey_3": Task(ruler.niah_multikey_3),
    "vt": Task(ruler.vt, repeats=True),
    "cwe": Task(ruler.cwe),
    "fwe": Task(ruler.fwe),
}


def task_names(names: Iterable[str]) -> list[str]:
    """Resolves names of tasks and of groups: "real-text", "ruler", "all".

    Raises:
        ValueError: A name is unknown.
    """
    groups = {
        "real-text": [name for name, task in TASKS.items() if task.real_text],
        "ruler": [name for name, task in TASKS.items() if not task.real_text],
        "all": list(TASKS),
    }
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
