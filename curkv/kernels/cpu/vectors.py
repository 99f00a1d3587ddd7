"""Keys and values in whatever format they lie: how one kernel's body reads and writes any of them.

A format's primitives are known when a kernel is compiled: they are one of its arguments, of a type of their
own, and nothing of them is left in the machine code. A `store` is a tuple of addresses, those of the format's
arrays; a vector is known by its token's number in the pool, page * page_size + place in the page.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.imputils import lower_constant
from numba.extending import NativeValue, models, overload, register_model, typeof_impl, unbox

from curkv.kernels.cpu.jit import intrinsic
from curkv.kernels.cpu.lanes import float32x8
from curkv.kernels.cpu.llvm import I64, Args, offset, pointer

Channels = Callable[[ir.Value], ir.Value]
"""Emits the eight channels of a vector from one on, as eight float32."""


class Primitives(ABC):
    """What kernels need of a format of vectors.

    Attributes:
        name: Of the format.
        arrays: How many it has.
        bits: Of a channel in the first array, where a vector lies in one piece.
    """

    name: str
    arrays: int
    bits: int

    @abstractmethod
    def row(self, builder: ir.IRBuilder, store: Args, dim: ir.Value, token: ir.Value) -> Channels:
        """Emit what there is to do once for a vector; what comes back emits reading its channels."""

    def place(self, builder: ir.IRBuilder, store: Args, dim: ir.Value, token: ir.Value) -> ir.Value:
        """Emit the address of a vector in the first array."""
        return offset(builder, store[0], token, self.channel_bytes(builder, dim))

    def channel_bytes(self, builder: ir.IRBuilder, channels: ir.Value) -> ir.Value:
        """Emit the bytes of some channels in the first array, without a shift where LLVM can do better."""
        if self.bits % 8 == 0:
            return builder.mul(channels, I64(self.bits // 8))
        return builder.lshr(builder.mul(channels, I64(self.bits)), I64(3))


class PrimitivesType(types.Opaque):
    """Numba type of a format's primitives."""

    def __init__(self, primitives: Primitives) -> None:
        self.primitives = primitives
        super().__init__(f"vectors of {primitives.name}")


@typeof_impl.register(Primitives)
def _typeof(primitives: Primitives, _: Any) -> PrimitivesType:
    return PrimitivesType(primitives)


register_model(PrimitivesType)(models.OpaqueModel)


@lower_constant(PrimitivesType)
def _constant(context: Any, builder: ir.IRBuilder, kind: Any, value: Any) -> Any:
    return context.get_dummy_value()


@unbox(PrimitivesType)
def _unbox(kind: Any, value: Any, context: Any) -> NativeValue:
    return NativeValue(context.context.get_dummy_value())


def by_format(stub: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function whose body is the static method of its name of the primitives, its first argument."""

    def body(primitives: Any, *_: Any) -> Any:
        return getattr(primitives.primitives, stub.__name__)

    overload(stub, inline="always", strict=False)(body)
    return stub


@intrinsic
def read_addresses(context: Any, primitives: Any, addresses: Any) -> Any:
    """The store whose arrays' addresses lie at an address."""
    count = primitives.primitives.arrays

    def generate(codegen: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        start = pointer(builder, args[1], I64)
        values = [builder.load(builder.gep(start, [I64(i)])) for i in range(count)]
        return codegen.make_tuple(builder, signature.return_type, values)

    return types.UniTuple(types.int64, count)(primitives, types.int64), generate


@intrinsic
def address_of(context: Any, primitives: Any, store: Any, dim: Any, token: Any) -> Any:
    """The address of a vector in the first array."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        return primitives.primitives.place(builder, addresses(builder, args[1]), *args[2:])

    return types.int64(primitives, store, types.int64, types.int64), generate


@intrinsic
def load_channels(context: Any, primitives: Any, store: Any, dim: Any, token: Any, first: Any) -> Any:
    """Eight channels of a vector from `first` on as float32x8."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        _primitives, store, dim, token, first = args
        return primitives.primitives.row(builder, addresses(builder, store), dim, token)(first)

    return float32x8(primitives, store, *[types.int64] * 3), generate


def addresses(builder: ir.IRBuilder, store: ir.Value) -> Args:
    """The addresses that a store is made of."""
    found: Args = cgutils.unpack_tuple(builder, store)
    return found
