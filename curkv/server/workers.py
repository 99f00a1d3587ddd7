"""Where texts are worked on: beside the event loop, which has to answer others meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

NUM_THREADS = 2
"""Threads beside the event loop.

More would gain nothing while they hold the interpreter's lock, and take cores from steps while not.
"""

_POOL = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="text")


async def in_worker(work: Callable[[], T]) -> T:
    """Awaits `work` done by one of the threads; what is cancelled before it began is not done."""
    return await asyncio.get_running_loop().run_in_executor(_POOL, work)
