"""Samples are of the wanted length, the same for the same seed, and can be answered from their context."""

from __future__ import annotations

import re

import pytest

from curkv.evaluation.corpora import load_corpus
from curkv.evaluation.tasks import TASKS, make_sample, task_names
from curkv.evaluation.tasks.base import Recipe, Sample, string_match_all
from curkv.evaluation.tasks.questions.texts import TEXTS
from curkv.evaluation.tasks.series import Series

LENGTH = 1200
SERIES = task_names(["series"])


def count_tokens(text: str) -> int:
    """A token per word or mark."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def sample(task: str, seed: int = 0, length: int = LENGTH, corpus: str = "documentation") -> Sample:
    return make_sample(Recipe(task, length, seed, corpus), count_tokens)


@pytest.mark.parametrize("task", [task for task in TASKS if task not in SERIES])
def test_a_sample_fills_its_length_and_is_that_of_its_seed(task: str) -> None:
    made = sample(task)
    used = count_tokens(made.context) + max(count_tokens(asked.question) for asked in made.asked)
    assert 0.9 * LENGTH < used <= LENGTH
    assert sample(task) == made
    assert sample(task, seed=1).context != made.context


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.protocol is None])
def test_the_answer_is_in_the_context_and_the_target_is_right(task: str) -> None:
    for seed in range(3):
        made = sample(task, seed)
        for asked in made.asked:
            assert string_match_all(made.context, asked.answers) == 1
            assert asked.target is None or string_match_all(asked.target, asked.answers) == 1
            assert string_match_all(asked.question, asked.answers) == 0


def test_a_continuation_is_the_text_itself() -> None:
    made = sample("continuation")
    text = load_corpus("documentation")
    [asked] = made.asked
    assert asked.target is not None and not asked.question
    assert made.context[-200:] + asked.target in text or made.context[:200] in text


def test_the_needle_grid_covers_all_depths() -> None:
    places = []
    for seed in range(10):
        made = sample("needle", seed, length=2000)
        [asked] = made.asked
        assert asked.depth == pytest.approx((seed + 0.5) / 10)
        places.append(made.context.index(asked.answers[0]) / len(made.context))
    assert places == sorted(places) and places[0] < 0.25 and places[-1] > 0.75


@pytest.mark.parametrize("kind", sorted(TEXTS.keys() - {"novel"}))
def test_questions_differ_in_family_and_are_answered_once_in_every_kind_of_text(kind: str) -> None:
    wordings = set()
    for seed in range(4):
        made = sample("questions", seed, corpus=kind)
        assert made.chat and len({asked.name for asked in made.asked}) == len(made.asked) == 5
        for asked in made.asked:
            assert asked.answers[0] in made.context
            wordings.add(asked.question)
    assert len(wordings) > 16


def test_a_date_may_be_said_with_the_month_first() -> None:
    [date] = [
        asked for seed in range(9) for asked in sample("questions", seed).asked if asked.name == "date"
    ][:1]
    day, month, year = date.answers[0].split()
    assert date.score(f"On {day} {month} {year}.") == date.score(f"On {month} {day}, {year}.") == 1
    assert date.score(f"In {month} {year}.") == date.score(f"On {month} {day}.") == 0


def test_a_kind_of_text_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="no text 'nope'"):
        sample("questions", corpus="nope")


@pytest.mark.parametrize("task", SERIES)
def test_a_series_goes_on_in_one_way_and_counts_up_to_the_first_mistake(task: str) -> None:
    made, other = sample(task, length=200), sample(task, 1, length=200)
    [asked] = made.asked
    assert made == sample(task, length=200) != other and isinstance(asked, Series)
    items, answer = asked.answers, "".join(asked.answers)
    most = count_tokens(made.context + answer)
    assert most <= 200 and (most > 170 or task == "copy")
    assert count_tokens(answer) <= asked.max_new_tokens and asked.score(answer + " and more") == 1
    assert asked.score(items[0] + items[2]) == 1 / len(items) and asked.score(items[1]) == 0
    if task == "copy":
        assert all(item in made.context for item in items)


@pytest.mark.parametrize("task", ["vt", "needle", "counting", "state"])
def test_a_length_that_holds_nothing_is_refused(task: str) -> None:
    with pytest.raises(ValueError, match="does not fit into 20 tokens"):
        sample(task, length=20)


def test_the_metric_is_the_share_of_references_found_whatever_case_and_breaks() -> None:
    assert string_match_all("It is\n FORTY two.", ["forty two", "seven"]) == 0.5


def test_task_groups() -> None:
    assert task_names(["ruler"]) == [
        "niah_single_1",
        "niah_multikey_2",
        "niah_multikey_3",
        "vt",
        "cwe",
        "fwe",
    ]
    assert task_names(["all", "vt"]) == list(TASKS)
    with pytest.raises(ValueError, match="unknown task nope"):
        task_names(["nope"])
