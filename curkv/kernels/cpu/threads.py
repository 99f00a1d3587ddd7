"""The threads that work through lists of launches, beside the one that asks for it.

A launch is a worker, its arguments, and how many parts its work has. Threads take parts: one that the machine
runs slower, or not at all for a while, does fewer. The thread that ends the last part of a launch begins the
next one of the list, so that a thread only ever waits for parts that others have begun. One that waits looks
for some microseconds and then sleeps until there is something to take: its core is free for other processes,
and for the thread of this one that the machine has put beside them on another core.

All that threads share is a few words that are never freed: a thread that comes late, when all has been done,
reads nothing else. Who has taken a part knows that its launch is there, since that cannot end before.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
import time
from typing import Any

import numba
from llvmlite import ir
from numba import types

from curkv.kernels.cpu.cores import usable_cores
from curkv.kernels.cpu.jit import intrinsic, kernel
from curkv.kernels.cpu.llvm import I64, Args
from curkv.kernels.cpu.memory import fetch_add, load_int64, store_int64
from curkv.kernels.cpu.waiting import (
    ALL,
    SYSTEM_CALL,
    read_shared,
    replace_shared,
    wait_while,
    wake,
    write_shared,
)

ENTRY = 3
"""Words of a launch in a list: the worker's address, that of its arguments, parts."""
SPINS = 2000
"""How often a thread looks for something to take before it sleeps: 30 to 100 us, in which Python launches."""
FOLLOWING = 1.0
"""Seconds after which the number of threads is fitted to the cores again."""

# The shared words, as bytes from the first one; those that are written often have a cache line of their own.
_TICKET = 0
"""Parts of the launch that nobody has taken, and 2^32 times the number of launches so far."""
_FINISHED = 64
_SLEEPERS = 128
_LIMIT = 192
"""2^32 times how many threads may help; negative when they are to end."""
_PARKED = 200
_LAUNCH = 256
"""The launch whose parts are taken, and the end of its list."""
_END = 264
_RUNNING = 272
"""Whether the list has not been done to its end."""
_SHARED_SIZE = 320
_HIGH = 1 << 32
_LOW = _HIGH - 1


@intrinsic
def _call_worker(context: Any, function: Any, arguments: Any, part: Any) -> Any:
    """Call the worker at an address."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        function_type = ir.FunctionType(ir.VoidType(), [I64, I64])
        builder.call(builder.inttoptr(args[0], function_type.as_pointer()), args[1:])

    return types.void(types.int64, types.int64, types.int64), generate


@kernel
def run_alone(launches: int, count: int, cleared: int, words: int) -> None:
    """Run a list of launches on this thread; see `_run`."""
    for i in range(words):
        store_int64(cleared + 8 * i, 0)
    for launch in range(launches, launches + 8 * ENTRY * count, 8 * ENTRY):
        for part in range(load_int64(launch + 16)):
            _call_worker(load_int64(launch), load_int64(launch + 8), part)


@kernel
def _run(shared: int, system_call: int, launches: int, count: int, cleared: int, words: int) -> None:
    """Run a list of launches that have parts; `cleared` and the `words` behind it are set to 0 before."""
    for i in range(words):
        store_int64(cleared + 8 * i, 0)
    write_shared(shared + _END, launches + 8 * ENTRY * count)
    write_shared(shared + _RUNNING, 1)
    _begin(shared, system_call, launches)
    _work_on(shared, system_call, launches, 0, False)
    while True:
        ticket = read_shared(shared + _TICKET)
        if not read_shared(shared + _RUNNING):
            break
        _help(shared, system_call, ticket, False)


@kernel
def _serve(shared: int, system_call: int, number: int) -> None:
    """What a thread of the pool does until it is told to end."""
    while True:
        limit = read_shared(shared + _LIMIT)
        if limit < 0:
            break
        if number >= limit >> 32:
            wait_while(shared + _LIMIT, limit, 0, shared + _PARKED, system_call)
        else:
            _help(shared, system_call, read_shared(shared + _TICKET), True)


@kernel
def _help(shared: int, system_call: int, ticket: int, wakes: bool) -> None:
    """Take a part and work on, or wait for one if a ticket that was read before says that there is none."""
    left = ticket & _LOW
    if left == 0:
        wait_while(shared + _TICKET, ticket, SPINS, shared + _SLEEPERS, system_call)
    elif replace_shared(shared + _TICKET, ticket, ticket - 1):
        launch = read_shared(shared + _LAUNCH)
        _work_on(shared, system_call, launch, load_int64(launch + 16) - left, wakes)


@kernel
def _work_on(shared: int, system_call: int, launch: int, part: int, wakes: bool) -> None:
    """Do a part that has been taken, and more until there is none to take.

    Args:
        shared: The shared words.
        system_call: `SYSTEM_CALL`.
        launch: Whose part it is.
        part: Its number.
        wakes: Whether to wake the thread that waits for the end of the list, which is another one.
    """
    while True:
        parts = load_int64(launch + 16)
        _call_worker(load_int64(launch), load_int64(launch + 8), part)
        if parts == 1 or fetch_add(shared + _FINISHED, 1) + 1 == parts:
            launch += 8 * ENTRY
            if launch == read_shared(shared + _END):
                write_shared(shared + _RUNNING, 0)
                fetch_add(shared + _TICKET, _HIGH)
                if wakes:
                    wake(shared + _TICKET, ALL, shared + _SLEEPERS, system_call)
                return
            _begin(shared, system_call, launch)
            part = 0
        else:
            ticket = read_shared(shared + _TICKET)
            while ticket & _LOW and not replace_shared(shared + _TICKET, ticket, ticket - 1):
                ticket = read_shared(shared + _TICKET)
            if ticket & _LOW == 0:
                return
            launch = read_shared(shared + _LAUNCH)
            part = load_int64(launch + 16) - (ticket & _LOW)


@kernel
def _begin(shared: int, system_call: int, launch: int) -> None:
    """Let others take all parts of a launch but the first; only when nobody has any part."""
    others = load_int64(launch + 16) - 1
    if others > 0:
        write_shared(shared + _LAUNCH, launch)
        write_shared(shared + _FINISHED, 0)
        fetch_add(shared + _TICKET, _HIGH + others)
        wake(shared + _TICKET, others, shared + _SLEEPERS, system_call)


class Threads:
    """The threads of this process, the one that calls among them.

    Attributes:
        most: How many there are at most; work is cut so that they all have something to do.
    """

    def __init__(self, most: int):
        self.most = most
        self._follows = True
        self._now = most
        self._looked = 0.0
        self._start_anew()

    @property
    def now(self) -> int:
        """How many work now."""
        return self._now

    def run(self, launches: int, count: int, cleared: int = 0, words: int = 0) -> None:
        """Runs a list of launches, each of which has parts.

        While one thread does, others that call run theirs alone.

        Args:
            launches: Its address.
            count: How many there are.
            cleared: Address of the int64 that are set to 0 before.
            words: Their number.
        """
        if self.most == 1 or not self._free.acquire(blocking=False):
            run_alone(launches, count, cleared, words)
            return
        try:
            self._follow()
            if self._now == 1:
                run_alone(launches, count, cleared, words)
            else:
                _run(self._shared, SYSTEM_CALL, launches, count, cleared, words)
        finally:
            self._free.release()

    def set(self, count: int) -> None:
        """Lets as many threads work from now on, whatever the machine's cores."""
        with self._free:
            self._follows = False
            self.most = max(self.most, count)
            self._allow(count)

    def _follow(self) -> None:
        """Fits the number of threads to what cores there are."""
        now = time.monotonic()
        if now - self._looked < FOLLOWING:
            return
        self._looked = now
        wanted = min(self.most, usable_cores()) if self._follows else self._now
        if wanted != self._now or len(self._started) < wanted - 1:
            self._allow(wanted)

    def _allow(self, count: int) -> None:
        self._now = count
        ctypes.c_int64.from_address(self._shared + _LIMIT).value = (count - 1) << 32
        _look_again(self._shared, SYSTEM_CALL)
        for number in range(len(self._started), count - 1):
            arguments = self._shared, SYSTEM_CALL, number
            thread = threading.Thread(target=_serve, args=arguments, name=f"kernels-{number}", daemon=True)
            self._started.append(thread)
            thread.start()

    def _start_anew(self) -> None:
        """Forgets the threads, of which a process that has been forked has none."""
        libc = ctypes.CDLL(None)
        libc.aligned_alloc.restype = ctypes.c_void_p
        self._shared: int = libc.aligned_alloc(ctypes.c_size_t(64), ctypes.c_size_t(_SHARED_SIZE))
        ctypes.memset(self._shared, 0, _SHARED_SIZE)
        self._free = threading.Lock()
        self._started: list[threading.Thread] = []
        self._looked = 0.0

    def _end(self) -> None:
        """Ends the threads, before the code that they run is taken down."""
        if self._free.acquire(timeout=1):  # and keeps it: who runs something now does so alone
            ctypes.c_int64.from_address(self._shared + _LIMIT).value = -1
            _look_again(self._shared, SYSTEM_CALL)
            for thread in self._started:
                thread.join(1)


@kernel
def _look_again(shared: int, system_call: int) -> None:
    """Wakes all threads of the pool, which then see the limit; only while no list is run."""
    fetch_add(shared + _TICKET, _HIGH)
    wake(shared + _TICKET, ALL, shared + _SLEEPERS, system_call)
    wake(shared + _LIMIT, ALL, shared + _PARKED, system_call)


THREADS = Threads(numba.config.NUMBA_NUM_THREADS)
"""As many as this process may use cores, or as NUMBA_NUM_THREADS says."""
os.register_at_fork(after_in_child=THREADS._start_anew)
atexit.register(THREADS._end)
