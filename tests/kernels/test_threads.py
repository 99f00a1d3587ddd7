"""Threads take parts of launches, sleep while they have none, and are as many as there are cores."""

from __future__ import annotations

import os
import threading
import time
from array import array
from collections.abc import Callable, Iterator

import pytest
import torch

from curkv.kernels.cpu import threads
from curkv.kernels.cpu.memory import fetch_add
from curkv.kernels.cpu.threads import Threads
from curkv.kernels.cpu.workers import compile_worker, read_arguments


def _count(arguments: int, part: int) -> None:
    """Counts each part, and whether an earlier launch of the list had been ended before."""
    counts, before, wanted = read_arguments(arguments, 3)
    fetch_add(counts + 8 * part, 1)
    if before and fetch_add(before, 0) != wanted:
        fetch_add(counts + 8 * part, 1000)


@pytest.fixture(scope="module")
def count() -> int:
    return compile_worker(_count)


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> Iterator[Threads]:
    monkeypatch.setattr(threads, "usable_cores", lambda: 4)
    made = Threads(4)
    yield made
    made._end()


class _Launches:
    """A list in which each launch looks whether the last part of the one before has been run."""

    def __init__(self, function: int, parts: list[int]):
        self.counts = [torch.zeros(n, dtype=torch.int64) for n in parts]
        self._arguments = [
            array(
                "q", (one.data_ptr(), 0 if before is None else before.data_ptr() + 8 * (len(before) - 1), 1)
            )
            for before, one in zip([None, *self.counts], self.counts, strict=False)
        ]
        words = [
            word
            for one, n in zip(self._arguments, parts, strict=True)
            for word in (function, one.buffer_info()[0], n)
        ]
        self._list = array("q", words)

    def run(self, on: Threads) -> None:
        for one in self.counts:
            one.zero_()
        on.run(self._list.buffer_info()[0], len(self.counts))

    @property
    def right(self) -> bool:
        return all(bool((one == 1).all()) for one in self.counts)


def test_every_part_runs_once_and_launches_in_order(four: Threads, count: int) -> None:
    launches = _Launches(count, [1, 7, 1, 1, 64, 2, 3, 1])
    for _ in range(300):
        launches.run(four)
        assert launches.right


def test_threads_that_have_fallen_asleep_are_woken(four: Threads, count: int) -> None:
    launches = _Launches(count, [1, 7, 1])
    for _ in range(5):
        launches.run(four)
        assert launches.right
        time.sleep(0.01)


def test_who_calls_while_others_run_runs_alone(four: Threads, count: int) -> None:
    wrong = []

    def often() -> None:
        launches = _Launches(count, [5, 1, 9])
        for _ in range(200):
            launches.run(four)
            wrong.extend([] if launches.right else [True])

    callers = [threading.Thread(target=often) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.parametrize("change", ["cores", "set"])
def test_their_number_follows_while_they_run(
    change: str, four: Threads, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "FOLLOWING", 0.0)
    launches = _Launches(count, [8, 8])
    lower: Callable[[int], None] = four.set
    if change == "cores":
        lower = lambda number: monkeypatch.setattr(threads, "usable_cores", lambda: number)  # noqa: E731
    for number in (2, 1, 4):
        lower(number)
        launches.run(four)
        assert four.now == number
        assert launches.right


def test_what_is_set_does_not_follow(four: Threads, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "FOLLOWING", 0.0)
    four.set(3)
    _Launches(count, [8]).run(four)
    assert four.now == 3


def test_threads_that_wait_take_no_time(four: Threads, count: int) -> None:
    _Launches(count, [8]).run(four)
    begun = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - begun < 0.1


def test_a_forked_process_has_threads_of_its_own(count: int) -> None:
    launches = _Launches(count, [8, 8])
    launches.run(threads.THREADS)
    child = os.fork()
    if not child:
        launches.run(threads.THREADS)
        os._exit(0 if launches.right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
