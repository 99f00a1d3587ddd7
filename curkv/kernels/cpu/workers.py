"""Launching compiled workers on all threads, at once or as a list that was recorded.

Numba compiles and optimises the body of a `prange` loop, and all that it calls, four times over. Here threads
(`threads.py`) call function pointers instead: a kernel is compiled once per KV dtype.

A worker is a function of (address of its arguments, part). A launch names how many parts its work has.

What a CUDA graph is to a GPU, a `Recording` is here: a decode step is some 400 launches, and Python takes
longer to make one than most of them run.
"""

from __future__ import annotations

import math
import struct
import time
import weakref
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numba
import torch
from llvmlite import ir
from numba import types
from torch import Tensor

from curkv.kernels.cpu.jit import intrinsic
from curkv.kernels.cpu.llvm import I64, Args
from curkv.kernels.cpu.threads import THREADS, run_alone

MOST_COUNTERS = 1 << 20
"""Most counters of a recording: 1,000 sequences of Llama-3.1-8B need a quarter."""


@intrinsic
def read_arguments(context: Any, arguments: Any, count: Any) -> Any:
    """The `count` (a literal) int64 at an address, as a tuple."""
    length = count.literal_value

    def generate(codegen: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        start = builder.inttoptr(args[0], I64.as_pointer())
        values = [builder.load(builder.gep(start, [I64(i)])) for i in range(length)]
        return codegen.make_tuple(builder, signature.return_type, values)

    return types.UniTuple(types.int64, length)(types.int64, count), generate


@intrinsic
def float_of_bits(context: Any, bits: Any) -> Any:
    """The float64 whose bits an int64 holds."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        return builder.bitcast(args[0], ir.DoubleType())

    return types.float64(types.int64), generate


def bits_of_float(value: float) -> int:
    """The bits of a float64 as an int64, to pass it among a worker's arguments."""
    bits: int = struct.unpack("q", struct.pack("d", value))[0]
    return bits


def compile_worker(function: Callable[[int, int], None]) -> int:
    """Compile a worker, or load it from Numba's cache; returns its address."""
    compiled = numba.cfunc(types.void(types.int64, types.int64), cache=True, error_model="numpy")(function)
    address: int = compiled.address
    _compiled[address] = compiled
    return address


_compiled: dict[int, Any] = {}
"""Compiled functions by address: one that is forgotten would be freed."""


def launch(function: int, parts: int, *arguments: int) -> None:
    """Run the parts 0 to `parts` - 1 of a worker, each on any thread, and wait for them."""
    started = time.perf_counter() if _clock is not None else 0.0
    packed = array("q", arguments)
    place = packed.buffer_info()[0]
    if parts:
        if _recording is not None:
            _recording.launches.append((function, parts, packed))
        entry = array("q", (function, place, parts))
        if parts == 1:
            run_alone(entry.buffer_info()[0], 1, 0, 0)
        else:
            THREADS.run(entry.buffer_info()[0], 1)
    if _clock is not None:
        _clock(_compiled[function].__wrapped__, time.perf_counter() - started)


Clock = Callable[[Callable[[int, int], None], float], None]
"""Is told the function of a worker that has been launched, and the seconds that it took."""
_clock: Clock | None = None


@contextmanager
def timing(clock: Clock) -> Iterator[None]:
    """Tells a clock of each launch made inside; a recording that is run is no launch."""
    global _clock
    before, _clock = _clock, clock
    try:
        yield
    finally:
        _clock = before


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory for what a launch writes; while recording, memory that the recording can use again."""
    if _recording is None:
        return torch.empty(shape, dtype=dtype)
    return _recording.memory.take(shape, dtype)


def counters(count: int) -> Tensor:
    """int64 [count] zeros, which a recording sets to 0 again whenever it is run."""
    if _recording is None:
        return torch.zeros(count, dtype=torch.int64)
    return _recording.take_counters(count)


class Memory:
    """Memory that recordings share, since one runs after the other.

    A piece is given out again when the last tensor over it is gone. In a recording that is when the last
    launch that reads it has been noted, so a launch that is given it again comes later in every run.

    Attributes:
        counters: int64, of which each recording sets to 0 those that it needs before it runs.
    """

    def __init__(self) -> None:
        self.counters = torch.zeros(MOST_COUNTERS, dtype=torch.int64)
        self._free: dict[int, list[Tensor]] = defaultdict(list)
        self._used: dict[int, Tensor] = {}

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor."""
        size = math.prod(shape) * dtype.itemsize
        room = max(64, 1 << (size - 1).bit_length())
        piece = self._free[room].pop() if self._free[room] else torch.empty(room, dtype=torch.int8)
        self._used[piece.data_ptr()] = piece
        buffer = piece.numpy()[:size]  # lives as long as the storage of the tensors over it
        weakref.finalize(buffer, self._take_back, piece).atexit = False
        return torch.from_numpy(buffer).view(dtype).view(shape)

    def unowned(self, tensor: Tensor) -> Tensor:
        """A tensor over the same memory that does not keep it from being given out again."""
        piece = self._used[tensor.data_ptr()]
        return piece[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)

    def _take_back(self, piece: Tensor) -> None:
        self._free[len(piece)].append(self._used.pop(piece.data_ptr()))


class Recording:
    """The launches of some work, to be run again with whatever its inputs hold then.

    All that the work does must be launches, and what they are told must depend on shapes alone: addresses
    stay, contents change. The memory of its results is used again by whatever is recorded or run next.
    """

    def __init__(self, memory: Memory):
        self.memory = memory
        self.launches: list[tuple[int, int, array[int]]] = []
        self._counted = 0
        self._list: array[int] = array("q")

    def take_counters(self, count: int) -> Tensor:
        """int64 [count] zeros.

        Raises:
            RuntimeError: the work needs more of them than a recording has.
        """
        first, self._counted = self._counted, self._counted + count
        if self._counted > len(self.memory.counters):
            raise RuntimeError("the recorded work needs too many counters")
        taken = self.memory.counters[first : self._counted]
        taken.numpy()[:] = 0
        return taken

    def run(self) -> None:
        """Does the recorded work."""
        if not self._list:
            for function, parts, packed in self.launches:
                self._list.extend((function, packed.buffer_info()[0], parts))
        place, cleared = self._list.buffer_info()[0], self.memory.counters.data_ptr()
        THREADS.run(place, len(self.launches), cleared, self._counted)


_recording: Recording | None = None


@contextmanager
def recording(memory: Memory) -> Iterator[Recording]:
    """Notes the launches made inside, which run as usual."""
    global _recording
    if _recording is not None:
        raise RuntimeError("recordings do not nest")
    _recording = made = Recording(memory)
    try:
        yield made
    finally:
        _recording = None
