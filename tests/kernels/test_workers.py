"""Launches run every part once, and recordings run again over what their inputs hold then."""

from __future__ import annotations

import gc

import pytest
import torch

from curkv.kernels.cpu import workers
from curkv.kernels.cpu.memory import fetch_add, load_int64
from curkv.kernels.cpu.workers import (
    Memory,
    compile_worker,
    counters,
    empty,
    launch,
    read_arguments,
    recording,
)


def _add_up(arguments: int, part: int) -> None:
    source, target = read_arguments(arguments, 2)
    fetch_add(target, load_int64(source + 8 * part))


def _double(arguments: int, part: int) -> None:
    source, target = read_arguments(arguments, 2)
    fetch_add(target, 2 * load_int64(source))


@pytest.fixture(scope="module")
def add_up() -> int:
    return compile_worker(_add_up)


@pytest.fixture(scope="module")
def double() -> int:
    return compile_worker(_double)


@pytest.mark.parametrize("parts", [0, 1, 2, 7, 1000])
def test_every_part_is_run_once(parts: int, add_up: int) -> None:
    numbers, total = torch.arange(1, 1001) ** 3, torch.zeros(1, dtype=torch.int64)
    launch(add_up, parts, numbers.data_ptr(), total.data_ptr())
    assert total.item() == numbers[:parts].sum()


def test_a_recording_runs_in_order_over_new_contents_with_counters_at_zero(add_up: int, double: int) -> None:
    numbers, result = torch.arange(100), torch.zeros(1, dtype=torch.int64)
    with recording(Memory()) as recorded:
        total = counters(1)
        launch(add_up, 100, numbers.data_ptr(), total.data_ptr())
        launch(double, 1, total.data_ptr(), result.data_ptr())
    assert result.item() == 2 * 4950
    for factor in (1, 3):
        numbers.copy_(factor * torch.arange(100))
        result.zero_()
        recorded.run()
        assert result.item() == factor * 2 * 4950


def test_recordings_over_one_memory_share_their_counters(add_up: int, double: int) -> None:
    memory, numbers = Memory(), torch.arange(100)
    runs = []
    for parts in (100, 10):
        result = torch.zeros(1, dtype=torch.int64)
        with recording(memory) as recorded:
            total = counters(1)
            launch(add_up, parts, numbers.data_ptr(), total.data_ptr())
            launch(double, 1, total.data_ptr(), result.data_ptr())
        runs.append((recorded, result, 2 * sum(range(parts)), total.data_ptr()))
    assert len({place for *_, place in runs}) == 1
    for recorded, result, wanted, _ in (*runs, *runs):
        result.zero_()
        recorded.run()
        assert result.item() == wanted


def test_memory_is_given_out_again_when_no_tensor_is_left_over_it() -> None:
    memory = Memory()
    with recording(memory):
        first = empty(10, 3)
        view, place = first[2:], first.data_ptr()
        unowned = memory.unowned(first)
        del first
        assert empty(30).data_ptr() != place
        del view
        gc.collect()
        assert empty(31).data_ptr() == place == unowned.data_ptr()
    assert unowned.shape == (10, 3)


def test_recordings_do_not_nest_and_end_with_their_block() -> None:
    with recording(Memory()), pytest.raises(RuntimeError, match="nest"), recording(Memory()):
        pass
    assert workers._recording is None
