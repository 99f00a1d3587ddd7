"""The tile of a matrix product that is held in vector registers, as LLVM vector code."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.errors import RequireLiteralValue
from numba.extending import intrinsic
from numba.np.arrayobj import make_array
from numpy.typing import NDArray

LANES = 8
VECTORS = 2

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(ir.FloatType(), LANES)


@njit(nogil=True, cache=True)
def gemm_tile(
    height: int,
    x: NDArray[Any],
    x_start: int,
    x_stride: int,
    w: NDArray[Any],
    w_start: int,
    depth: int,
    out: NDArray[Any],
    out_start: int,
    out_stride: int,
    add: bool,
) -> None:
    """Multiplies `height` (1 to 6) rows of x with a panel of 16 columns: out[h, :] (+)= x[h, :] w.

    Args:
        height: rows of the tile.
        x: float32; row h begins at x_start + h * x_stride.
        x_start: see x.
        x_stride: see x.
        w: float32, [depth, 16] from w_start on.
        w_start: see w.
        depth: columns of x, at least 1.
        out: float32; row h begins at out_start + h * out_stride.
        out_start: see out.
        out_stride: see out.
        add: whether the product is added to what stands in out.
    """
    if height == 6:
        _tile(6, x, x_start, x_stride, w, w_start, depth, out, out_start, out_stride, add)
    elif height == 5:
        _tile(5, x, x_start, x_stride, w, w_start, depth, out, out_start, out_stride, add)
    elif height == 4:
        _tile(4, x, x_start, x_stride, w, w_start, depth, out, out_start, out_stride, add)
    elif height == 3:
        _tile(3, x, x_start, x_stride, w, w_start, depth, out, out_start, out_stride, add)
    elif height == 2:
        _tile(2, x, x_start, x_stride, w, w_start, depth, out, out_start, out_stride, add)
    else:
        _tile(1, x, x_start, x_stride, w, w_start, depth, out, out_start, out_stride, add)


@intrinsic
def _tile(
    typing: Any,
    height: Any,
    x: Any,
    x_start: Any,
    x_stride: Any,
    w: Any,
    w_start: Any,
    depth: Any,
    out: Any,
    out_start: Any,
    out_stride: Any,
    add: Any,
) -> Any:
    if not isinstance(height, types.IntegerLiteral):
        raise RequireLiteralValue("the height of a tile is fixed when it is compiled")
    rows, i64 = height.literal_value, types.int64
    signature = types.void(height, x, i64, i64, w, i64, i64, out, i64, i64, types.boolean)

    def codegen(context: Any, b: Any, sig: Any, args: Any) -> Any:
        _, x_value, x_first, x_step, w_value, w_first, size, out_value, out_first, out_step, adds = args

        def pointers(arg: int, value: Any, start: Any, stride: Any, count: int) -> list[Any]:
            data = b.gep(make_array(sig.args[arg])(context, b, value).data, [start])
            return [b.gep(data, [b.mul(stride, ir.Constant(_I64, row))]) for row in range(count)]

        x_rows = pointers(1, x_value, x_first, x_step, rows)
        out_rows = pointers(7, out_value, out_first, out_step, rows)
        (panel,) = pointers(4, w_value, w_first, ir.Constant(_I64, 0), 1)
        before = b.block
        loop, done = b.append_basic_block("depth"), b.append_basic_block("store")
        b.branch(loop)

        b.position_at_end(loop)
        index = b.phi(_I64)
        index.add_incoming(ir.Constant(_I64, 0), before)
        sums = [b.phi(_VECTOR) for _ in range(rows * VECTORS)]
        column = b.mul(index, ir.Constant(_I64, LANES * VECTORS))
        weights = [_load(b, panel, b.add(column, ir.Constant(_I64, LANES * v))) for v in range(VECTORS)]
        for row in range(rows):
            scalar = _broadcast(b, b.load(b.gep(x_rows[row], [index])))
            for v in range(VECTORS):
                total = sums[row * VECTORS + v]
                total.add_incoming(ir.Constant(_VECTOR, [0.0] * LANES), before)
                total.add_incoming(_fma(b, scalar, weights[v], total), loop)
        following = b.add(index, ir.Constant(_I64, 1))
        index.add_incoming(following, loop)
        b.cbranch(b.icmp_signed("<", following, size), loop, done)

        b.position_at_end(done)
        results = [total.incomings[1][0] for total in sums]
        for row in range(rows):
            for v in range(VECTORS):
                place = b.gep(out_rows[row], [ir.Constant(_I64, LANES * v)])
                target = b.bitcast(place, _VECTOR.as_pointer())
                result = results[row * VECTORS + v]
                with b.if_else(adds) as (then, otherwise):
                    with then:
                        b.store(b.fadd(b.load(target, align=4), result), target, align=4)
                    with otherwise:
                        b.store(result, target, align=4)
        return context.get_dummy_value()

    return signature, codegen


def _load(b: Any, pointer: Any, offset: Any) -> Any:
    return b.load(b.bitcast(b.gep(pointer, [offset]), _VECTOR.as_pointer()), align=4)


def _broadcast(b: Any, scalar: Any) -> Any:
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    first = b.insert_element(undefined, scalar, ir.Constant(_I32, 0))
    return b.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES))


def _fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    return b.call(cgutils.get_or_insert_function(b.module, kind, f"llvm.fma.v{LANES}f32"), [x, y, z])
