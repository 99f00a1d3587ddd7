"""What is asked of the C library and the kernel leaves the process as it was, and smaller."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from curkv.server.process import trim_heap, unmap_code

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


def test_a_trimmed_heap_can_be_used() -> None:
    kept = [bytearray(1 << 20) for _ in range(8)]
    trim_heap()
    assert all(not any(piece) for piece in kept)
