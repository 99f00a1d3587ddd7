"""What is asked of interpreter, C library and kernel leaves the process as it was, and smaller."""

from __future__ import annotations

import gc
import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from curkv.server.process import keep_freed_memory, spare_collector, trim_heap, unmap_code

SMAPS = Path("/proc/self/smaps")


def resident_code() -> int:
    """KiB of files' code in memory."""
    total, counts = 0, False
    for line in SMAPS.read_text().splitlines():
        key, *rest = line.split()
        if not key.endswith(":"):
            counts = rest[0] == "r-xp" and len(rest) == 5
        elif key == "Rss:" and counts:
            total += int(rest[0])
    return total


@pytest.mark.skipif(not SMAPS.exists(), reason=f"{sys.platform} has no /proc/self/smaps")
def test_code_that_is_not_run_leaves_memory_and_comes_back() -> None:
    a = torch.randn(64, 64)
    expected, before = a @ a, resident_code()
    unmap_code()
    assert resident_code() < before / 2
    assert torch.equal(a @ a, expected)


def test_the_collector_looks_at_nothing_that_stays() -> None:
    spare_collector()
    try:
        assert len(gc.get_objects()) < 1000 < gc.get_freeze_count()
    finally:
        gc.unfreeze()


def test_a_trimmed_heap_can_be_used() -> None:
    kept = [bytearray(1 << 20) for _ in range(8)]
    trim_heap()
    assert all(not any(piece) for piece in kept)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_is_used_again_without_new_pages() -> None:
    # In a process of its own: what is asked of the C library holds for good.
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert pool.submit(new_pages).result() < 100


def new_pages() -> int:
    """How many pages the kernel hands out while 32 MiB are taken and freed twenty times, the second time."""
    keep_freed_memory()
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            _taken = [torch.ones(1 << 20) for _ in range(8)]
            del _taken
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
