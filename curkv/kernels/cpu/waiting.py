"""Words that several threads read and write, and waiting for one of them to change."""

from __future__ import annotations

import ctypes
import platform
from typing import Any

from llvmlite import ir
from numba import types

from curkv.kernels.cpu.jit import intrinsic, kernel
from curkv.kernels.cpu.llvm import I32, I64, Args, call, pointer
from curkv.kernels.cpu.memory import fetch_add

_FUTEX = {"x86_64": 202, "aarch64": 98}[platform.machine()]  # the number of the system call
_PAUSE: tuple[str, Args] = {
    "x86_64": ("llvm.x86.sse2.pause", []),
    "aarch64": ("llvm.aarch64.hint", [I32(1)]),
}[platform.machine()]
_WAIT, _WAKE = 128, 129  # FUTEX_WAIT and FUTEX_WAKE, of threads of one process
SYSTEM_CALL: int = ctypes.cast(ctypes.CDLL(None).syscall, ctypes.c_void_p).value or 0
"""Address of C's `syscall`."""
ALL = 2**31 - 1
"""As many as there are."""


@intrinsic
def read_shared(context: Any, location: Any) -> Any:
    """An int64 that other threads write; what they wrote before it is seen afterwards."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        return builder.load_atomic(pointer(builder, args[0], I64), "seq_cst", 8)

    return types.int64(types.int64), generate


@intrinsic
def write_shared(context: Any, location: Any, value: Any) -> Any:
    """Store an int64 that other threads read."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        builder.store_atomic(args[1], pointer(builder, args[0], I64), "seq_cst", 8)

    return types.void(types.int64, types.int64), generate


@intrinsic
def replace_shared(context: Any, location: Any, old: Any, new: Any) -> Any:
    """Store an int64 if another one is there, and tell whether it was."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        place = pointer(builder, args[0], I64)
        return builder.extract_value(builder.cmpxchg(place, args[1], args[2], "seq_cst", "monotonic"), 1)

    return types.boolean(types.int64, types.int64, types.int64), generate


@intrinsic
def _pause(context: Any) -> Any:
    """Leave the core's units to its other thread for some cycles."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        name, arguments = _PAUSE
        call(builder, name, ir.VoidType(), arguments)

    return types.void(), generate


@intrinsic
def _futex(context: Any, function: Any, location: Any, operation: Any, value: Any) -> Any:
    """Linux' futex(2) over the int32 at an address, without a limit of time."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        function, location, operation, value = args
        kind = ir.FunctionType(I64, [I64], var_arg=True)
        words = [I64(_FUTEX), location, builder.trunc(operation, I32), builder.trunc(value, I32), I64(0)]
        builder.call(builder.inttoptr(function, kind.as_pointer()), words)

    return types.void(*[types.int64] * 4), generate


@kernel
def wait_while(location: int, value: int, spins: int, sleepers: int, system_call: int) -> None:
    """Wait until an int64 is no longer `value`, or for nothing at all now and then.

    Args:
        location: Its address; whoever changes its high half, and no less, calls `wake` afterwards.
        value: What it is no longer to be.
        spins: How often to look before going to sleep.
        sleepers: Address of an int64, how many threads sleep.
        system_call: `SYSTEM_CALL`.
    """
    for _ in range(spins):
        if read_shared(location) != value:
            return
        _pause()
    fetch_add(sleepers, 1)
    _futex(system_call, location + 4, _WAIT, value >> 32)
    fetch_add(sleepers, -1)


@kernel
def wake(location: int, most: int, sleepers: int, system_call: int) -> None:
    """Wake up to `most` threads that sleep until the int64 at an address changes, if there are any."""
    if read_shared(sleepers) > 0:
        _futex(system_call, location + 4, _WAKE, most)
