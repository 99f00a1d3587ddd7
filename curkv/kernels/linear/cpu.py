"""Linear layers on CPU: weights in panels of 16 rows, multiplied tile by tile in vector registers.

One layout serves a single token and a long chunk. A panel is read from memory in the order it is stored,
which lets a decode step run at memory bandwidth, and a 6 x 16 tile of the result keeps 12 of 16 vector
registers busy, which lets a prefill chunk run at the arithmetic peak (Goto and van de Geijn, "Anatomy of
high-performance matrix multiplication", 2008).

Weights are float32, int8 with a scale per row, or int4 with a step and a lowest value per row and 32 columns.
Where the machine multiplies bytes in fours, rows of x are rounded to 8 bits with a scale per 32 columns, as
llama.cpp does; for int4 weights everywhere. Elsewhere int8 weights are multiplied with int16: a scale per
`BLOCK_DEPTH` columns, as fine as sums of so many products in an int32 allow, about 15 bits.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from curkv.kernels.cpu.features import MULTIPLIES_QUADS
from curkv.kernels.cpu.jit import inlined, kernel
from curkv.kernels.cpu.lanes import absolute, broadcast, fma, lane_max, lane_sum, maximum, mul
from curkv.kernels.cpu.llvm import LANES
from curkv.kernels.cpu.memory import (
    FLOAT32,
    INT8,
    address,
    array,
    floats,
    load,
    load_int64,
    load_scalar,
    store_int16,
    store_scalar,
)
from curkv.kernels.cpu.quads import BYTES, OWN_NIBBLES, QUAD_BLOCK, quad_tile
from curkv.kernels.cpu.threads import THREADS
from curkv.kernels.cpu.tiles import PANEL, TILE_ROWS, panel_tile
from curkv.kernels.cpu.workers import (
    bits_of_float,
    compile_worker,
    empty,
    float_of_bits,
    launch,
    read_arguments,
)
from curkv.kernels.linear import formats, reference
from curkv.kernels.linear.formats import WeightFormat
from curkv.kernels.linear.packing import BYTE, pack_bytes, pack_nibbles
from curkv.kernels.linear.reference import ComposedLinear
from curkv.kernels.linear.rounded_rows import (
    PART_SIZE,
    QUAD_UNIT,
    SMALLEST,
    RoundedRows,
    round_gated_rows,
    round_normed_rows,
    round_rows,
)
from curkv.kernels.linear.spec import GroupedLinear, Linear, Packed
from curkv.kernels.rms_norm.cpu import rms_norm
from curkv.kernels.silu_mul.cpu import silu_mul

BLOCK_ROWS = 96
"""Rows of x that are multiplied with a panel before the next one: they stay in the second-level cache."""
BLOCK_DEPTH = 576
"""Columns of a panel used at a time: such a part of it stays in the first-level cache."""
AHEAD = 2048
"""Bytes by which a panel is prefetched."""
LARGEST = (2**31 - 1) // (127 * BLOCK_DEPTH)
"""Largest of the integers that stand for x: a block of products with weights up to 127 fits an int32."""
PARTS_PER_THREAD = 4
"""Parts of a product per thread, so that a thread that the machine runs slower does fewer."""


def pack_linear(
    weight: Tensor | Packed, bias: Tensor | None = None, form: WeightFormat = formats.FLOAT32
) -> PackedLinear:
    """Makes a linear layer, see `reference.pack_linear`; `weight` may be freed afterwards.

    With weights that are rounded, a row of x that has NaN or infinity gives a row of NaN.

    Args:
        weight: [N, K], or what was packed of it before, in this format and on such a machine.
        bias: [N].
        form: The weight's format.

    Raises:
        ValueError: there are no panels of the format.
    """
    return _layer(form)(weight, bias)


def layout(form: WeightFormat) -> str:
    """Names how weights of a format lie in memory on this machine: what is packed so can be used again."""
    return _layer(form).__name__


def _layer(form: WeightFormat) -> type[PackedLinear]:
    if form.name not in _LAYERS:
        raise ValueError(f"there are no CPU kernels for weights of {form.name}; only {', '.join(_LAYERS)}")
    return _LAYERS[form.name]


class Operand(NamedTuple):
    """What a weight is multiplied with.

    Attributes:
        rows: How many.
        places: Addresses, as the worker reads them.
        memory: Where they lie.
    """

    rows: int
    places: tuple[int, ...]
    memory: tuple[Tensor, ...]


class PackedLinear(ComposedLinear):
    """A linear layer over panels.

    Attributes:
        packed: What it is made of.
        nbytes: Memory of the weights.
    """

    packed: Packed
    rms_norm = staticmethod(rms_norm)
    silu_mul = staticmethod(silu_mul)

    def __init__(self, weight: Tensor | Packed, bias: Tensor | None):
        """Packs the weight, [N, K], unless that has been done."""
        self.packed = weight if isinstance(weight, Packed) else self.pack(weight)
        panels, scales = self.packed.panels, self.packed.scales
        self._rows, self._depth, self._panels = self.packed.rows, self.packed.depth, len(panels)
        self._panels_at = panels.data_ptr(), panels[0].nbytes, 0 if scales is None else scales.data_ptr()
        self._bias = None if bias is None else bias.float()
        self.nbytes = sum(part.nbytes for part in (panels, scales, self._bias) if part is not None)

    @classmethod
    @abstractmethod
    def pack(cls, weight: Tensor) -> Packed:
        """Lays a weight, [N, K], in panels."""

    def __call__(self, x: Tensor) -> Tensor:
        """See `ComposedLinear.__call__`."""
        return self._multiply(self.operand(x))

    def operand(self, x: Tensor) -> Operand:
        """Makes of x, [T, K], what is multiplied."""
        return self._operand(x if self._depth == x.shape[1] else _copy(x, self._depth))

    def gated_operand(self, gate_up: Tensor) -> Operand:
        """Makes of [T, 2 K] what is multiplied with in `after_silu_mul`."""
        return self.operand(self.silu_mul(gate_up))

    @abstractmethod
    def _operand(self, x: Tensor) -> Operand:
        """Of x [T, depth]."""

    @abstractmethod
    def worker(self, grouped: bool = False) -> int:
        """The worker that multiplies an operand with panels, of one layer or of several."""

    def _multiply(self, x: Operand) -> Tensor:
        """x W^T + b."""
        out = empty(x.rows, self._panels * PANEL)
        parts = self.parts
        launch(
            self.worker(), parts if x.rows else 0,
            *x.places, *self._panels_at, out.data_ptr(), x.rows, self._depth, self._panels, parts,
        )  # fmt: skip
        if self._bias is None and self._panels * PANEL == self._rows:
            return out
        return _copy(out, self._rows, self._bias)

    @property
    def parts(self) -> int:
        """Parts of a product."""
        return min(self._panels, PARTS_PER_THREAD * THREADS.most)

    @property
    def shape(self) -> tuple[int, ...]:
        """What layers that run as one have in common: rows, depth, panels, bytes of a panel."""
        return self._rows, self._depth, self._panels, self._panels_at[1]

    @property
    def places(self) -> tuple[int, int, int]:
        """Addresses of panels, scales and bias; 0: there is none."""
        return self._panels_at[0], self._panels_at[2], 0 if self._bias is None else self._bias.data_ptr()


class FloatLinear(PackedLinear):
    """With float32 weights."""

    @classmethod
    def pack(cls, weight: Tensor) -> Packed:
        """See `PackedLinear.pack`: [panels, K, 16]."""
        rows, depth = weight.shape
        packed = torch.zeros(_panels(rows) * PANEL, depth)
        packed[:rows] = weight
        packed = packed.view(-1, PANEL, depth).transpose(1, 2).contiguous()
        return Packed(rows, depth, depth, packed, None)

    def rows(self, ids: Tensor, factor: float = 1.0) -> Tensor:
        """See `ComposedLinear.rows`."""
        out = empty(len(ids), self.packed.columns)
        places = address(ids, torch.int64), self.packed.panels.data_ptr(), out.data_ptr()
        launch(_float_rows(), len(ids), *places, self._depth, bits_of_float(factor))
        return out

    def worker(self, grouped: bool = False) -> int:
        """See `PackedLinear.worker`."""
        return _worker(False, grouped)

    def _operand(self, x: Tensor) -> Operand:
        return Operand(len(x), (address(x, torch.float32), 0), (x,))


class ByteLinear(PackedLinear):
    """With int8 weights, some columns of a row side by side.

    Attributes:
        together: How many.
        multiple: What the columns are filled up to.
        zero: What stands for zero.
        unit: What the rows' scales are multiplied with.
    """

    together: ClassVar[int]
    multiple: ClassVar[int]
    zero: ClassVar[int] = 0
    unit: ClassVar[int] = 1

    @classmethod
    def pack(cls, weight: Tensor) -> Packed:
        """See `PackedLinear.pack` and `pack_bytes`."""
        rows, columns = weight.shape
        depth = columns + -columns % cls.multiple
        return Packed(rows, depth, columns, *pack_bytes(weight, cls.together, depth, cls.zero, cls.unit))

    def rows(self, ids: Tensor, factor: float = 1.0) -> Tensor:
        """See `ComposedLinear.rows`."""
        out = empty(len(ids), self.packed.columns)
        launch(
            _byte_rows(), len(ids), address(ids, torch.int64), self._panels_at[0], self._panels_at[2],
            out.data_ptr(), self.packed.columns, self._depth, self.together, self.zero,
            bits_of_float(factor / self.unit),
        )  # fmt: skip
        return out


class PairLinear(ByteLinear):
    """With int8 weights, multiplied in pairs with int16."""

    together, multiple = 2, LANES

    def worker(self, grouped: bool = False) -> int:
        """See `PackedLinear.worker`."""
        return _worker(True, grouped)

    def _operand(self, x: Tensor) -> Operand:
        count, depth = x.shape
        integers = empty(count, depth, dtype=torch.int16)
        scales = empty(-(-depth // BLOCK_DEPTH), count)
        at_once = max(1, PART_SIZE // depth)
        launch(
            _quantiser(), -(-count // at_once),
            count, at_once, address(x, torch.float32), integers.data_ptr(), scales.data_ptr(), depth,
        )  # fmt: skip
        return Operand(count, (integers.data_ptr(), scales.data_ptr()), (integers, scales))


class RoundingLinear(PackedLinear):
    """With weights that are multiplied in fours with int8.

    Attributes:
        form: What they are, see `quad_tile`.
    """

    form: int

    def after_rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `ComposedLinear.after_rms_norm`; normalises and rounds in one pass."""
        if x.shape[1] != self._depth:
            return super().after_rms_norm(x, weight, eps, residual)
        rows, total = round_normed_rows(x, weight, eps, residual, self.form == BYTES)
        return self._multiply(_rounded(rows)), total

    def after_silu_mul(self, gate_up: Tensor) -> Tensor:
        """See `ComposedLinear.after_silu_mul`."""
        return self._multiply(self.gated_operand(gate_up))

    def gated_operand(self, gate_up: Tensor) -> Operand:
        """See `PackedLinear.gated_operand`; gates and rounds in one pass."""
        if gate_up.shape[1] != 2 * self._depth:
            return super().gated_operand(gate_up)
        return _rounded(round_gated_rows(gate_up, self.form == BYTES))

    def worker(self, grouped: bool = False) -> int:
        """See `PackedLinear.worker`."""
        return _quad_worker(self.form, grouped)

    def _operand(self, x: Tensor) -> Operand:
        return _rounded(round_rows(x, self.form == BYTES))


def _rounded(x: RoundedRows) -> Operand:
    return Operand(x.rows, (x.integers, x.scales, x.sums), (x.memory,))


class QuadLinear(RoundingLinear, ByteLinear):
    """With int8 weights, multiplied in fours."""

    form = BYTES
    together, multiple, zero, unit = 4, QUAD_BLOCK, 128, QUAD_UNIT


class NibbleLinear(RoundingLinear):
    """With weights of 4 bits."""

    def __init__(self, weight: Tensor | Packed, bias: Tensor | None, form: int = OWN_NIBBLES):
        super().__init__(weight, bias)
        self.form = form

    @classmethod
    def pack(cls, weight: Tensor) -> Packed:
        """See `PackedLinear.pack` and `pack_nibbles`."""
        rows, columns = weight.shape
        return Packed(rows, columns + -columns % QUAD_BLOCK, columns, pack_nibbles(weight), None)


_LAYERS: dict[str, type[PackedLinear]] = {
    formats.FLOAT32.name: FloatLinear,
    formats.INT8.name: QuadLinear if MULTIPLIES_QUADS else PairLinear,
    formats.INT4.name: NibbleLinear,
}


def group_linear(layers: Sequence[Linear]) -> GroupedLinear:
    """Has linear layers of one shape run as one, see `reference.group_linear`; in one launch if they can."""
    packed = [layer for layer in layers if isinstance(layer, PackedLinear)]
    if len(packed) < len(layers) or len({(layer.worker(grouped=True), layer.shape) for layer in packed}) > 1:
        return reference.GroupedLinear(layers)
    return PackedGroup(packed)


class PackedGroup:
    """Layers that one launch multiplies with: a part of it is a share of the panels of a group's layer."""

    def __init__(self, layers: Sequence[PackedLinear]):
        self._layers = layers
        self._places = torch.tensor([layer.places for layer in layers])

    def __call__(self, x: Tensor, groups: Tensor) -> Tensor:
        """See `reference.GroupedLinear`."""
        return self._multiply(self._layers[0].operand(x), groups)

    def after_silu_mul(self, gate_up: Tensor, groups: Tensor) -> Tensor:
        """See `reference.GroupedLinear.after_silu_mul`."""
        return self._multiply(self._layers[0].gated_operand(gate_up), groups)

    def _multiply(self, x: Operand, groups: Tensor) -> Tensor:
        layer = self._layers[0]
        rows, depth, panels, panel_bytes = layer.shape
        out, parts = empty(x.rows, panels * PANEL), layer.parts
        launch(
            layer.worker(grouped=True), parts * len(groups),
            *x.places, address(groups, torch.int64), self._places.data_ptr(), panel_bytes,
            out.data_ptr(), x.rows, depth, panels, parts, rows,
        )  # fmt: skip
        return out if panels * PANEL == rows else _copy(out, rows)


def _panels(rows: int) -> int:
    return -(-rows // PANEL)


def _copy(x: Tensor, width: int, bias: Tensor | None = None) -> Tensor:
    """The rows of x, plus the bias, cut off or filled up with zeros to `width`."""
    out = empty(len(x), width)
    places = address(x, torch.float32), out.data_ptr(), 0 if bias is None else address(bias, torch.float32)
    launch(_copier(), min(1, len(x)), *places, len(x), x.shape[1], width)
    return out


@functools.cache
def _copier() -> int:
    def work(arguments: int, part: int) -> None:
        x, out, bias, count, x_width, width = read_arguments(arguments, 6)
        for row in range(count):
            source, target = floats(x + 4 * row * x_width, x_width), floats(out + 4 * row * width, width)
            for i in range(min(x_width, width)):
                target[i] = source[i]
            for i in range(x_width, width):
                target[i] = 0
            if bias:
                offset = floats(bias, width)
                for i in range(width):
                    target[i] += offset[i]

    return compile_worker(work)


@functools.cache
def _float_rows() -> int:
    """Reads one row of panels [panels, depth, 16]."""

    def work(arguments: int, part: int) -> None:
        ids, panels, out, depth, factor = read_arguments(arguments, 5)
        row = load_int64(ids + 8 * part)
        source = floats(panels + 4 * (row // PANEL * depth * PANEL + row % PANEL), depth * PANEL)
        target, times = floats(out + 4 * part * depth, depth), np.float32(float_of_bits(factor))
        for i in range(depth):
            target[i] = source[i * PANEL] * times

    return compile_worker(work)


@functools.cache
def _byte_rows() -> int:
    """Reads one row of panels [panels, depth / together, 16, together]."""

    def work(arguments: int, part: int) -> None:
        ids, panels, scales, out, columns, depth, together, zero, factor = read_arguments(arguments, 9)
        row = load_int64(ids + 8 * part)
        first = panels + row // PANEL * depth * PANEL + row % PANEL * together
        scale = np.float32(load_scalar(FLOAT32, scales + 4 * row) * float_of_bits(factor))
        target = floats(out + 4 * part * columns, columns)
        for i in range(0, columns, together):
            source = array(BYTE, first + i * PANEL, together)
            for j in range(min(together, columns - i)):
                byte = np.int32(source[j])
                target[i + j] = np.float32(byte - zero if zero or byte < 128 else byte - 256) * scale

    return compile_worker(work)


@functools.cache
def _quantiser() -> int:
    def work(arguments: int, part: int) -> None:
        count, at_once = read_arguments(arguments, 2)
        first = part * at_once
        _quantise_for_pairs(first, min(count, first + at_once), count, *read_arguments(arguments + 16, 4))

    return compile_worker(work)


@functools.cache
def _worker(int8: bool, grouped: bool) -> int:
    """Multiplies count rows of x [count, depth] with a share of the panels, or of those of a group."""
    kind, item = (INT8, 2) if int8 else (FLOAT32, 4)

    def work(arguments: int, part: int) -> None:
        x, x_scales, weight, _panel_bytes, scales, out, count, depth, panels, parts = read_arguments(
            arguments, 10
        )
        _multiply_part(
            kind, item, 0, count, x, x_scales, weight, scales, out, count, depth, panels, part, parts
        )

    def work_of_group(arguments: int, part: int) -> None:
        x, x_scales, groups, layers, _panel_bytes, out, count, depth, panels, parts, rows = read_arguments(
            arguments, 11
        )
        layer, first, end = _group(groups + 24 * (part // parts), layers)
        if first < end:
            share, weight, scales = part % parts, load_int64(layer), load_int64(layer + 8)
            _multiply_part(
                kind, item, first, end, x, x_scales, weight, scales, out, count, depth, panels, share, parts
            )
            _add_bias(load_int64(layer + 16), first, end, out, panels, share, parts, rows)

    return compile_worker(work_of_group if grouped else work)


@functools.cache
def _quad_worker(weights: int, grouped: bool) -> int:
    def work(arguments: int, part: int) -> None:
        x, x_scales, x_sums, weight, panel_bytes, scales, out, count, depth, panels, parts = read_arguments(
            arguments, 11
        )
        _multiply_quads_part(
            weights, part, 0, count, x, x_scales, x_sums, weight, panel_bytes, scales, out, count, depth,
            panels, parts,
        )  # fmt: skip

    def work_of_group(arguments: int, part: int) -> None:
        x, x_scales, x_sums, groups, layers, panel_bytes, out, count, depth, panels, parts, rows = (
            read_arguments(arguments, 12)
        )
        layer, first, end = _group(groups + 24 * (part // parts), layers)
        if first < end:
            share, weight, scales = part % parts, load_int64(layer), load_int64(layer + 8)
            _multiply_quads_part(
                weights, share, first, end, x, x_scales, x_sums, weight, panel_bytes, scales, out, count,
                depth, panels, parts,
            )  # fmt: skip
            _add_bias(load_int64(layer + 16), first, end, out, panels, share, parts, rows)

    return compile_worker(work_of_group if grouped else work)


@inlined
def _group(group: int, layers: int) -> tuple[int, int, int]:
    """Where the places of a group's layer stand, its first row, and the end of its rows."""
    first = load_int64(group + 8)
    return layers + 24 * load_int64(group), first, first + load_int64(group + 16)


@inlined
def _add_bias(
    bias: int, first: int, end: int, out: int, panels: int, part: int, parts: int, rows: int
) -> None:
    """Add the bias, if there is one, to what a part has written of some rows of out."""
    start, stop = panels * part // parts * PANEL, min(rows, panels * (part + 1) // parts * PANEL)
    if bias and start < stop:
        more = floats(bias + 4 * start, stop - start)
        for row in range(first, end):
            target = floats(out + 4 * (row * panels * PANEL + start), stop - start)
            for i in range(stop - start):
                target[i] += more[i]


@kernel
def _quantise_for_pairs(
    first: int, end: int, count: int, x: int, integers: int, scales: int, depth: int
) -> None:
    """Round the rows [first, end) of x [count, depth] to int16; scales are [blocks of the depth, count]."""
    for row in range(first, end):
        for start in range(0, depth, BLOCK_DEPTH):
            place = row * depth + start
            size = min(BLOCK_DEPTH, depth - start)
            scale = _quantise_block(x + 4 * place, integers + 2 * place, size)
            store_scalar(FLOAT32, scales + 4 * (start // BLOCK_DEPTH * count + row), scale)


@inlined
def _multiply_quads_part(
    weights: Any, part: int, first: int, end: int, x: int, x_scales: int, x_sums: int, weight: int,
    panel_bytes: int, scales: int, out: int, count: int, depth: int, panels: int, parts: int,
) -> None:  # fmt: skip
    """Multiply the rows [first, end) of x, int8 [count, depth], with one of `parts` shares of the panels."""
    width = panels * PANEL
    for row in range(first, end, BLOCK_ROWS):
        rows = min(BLOCK_ROWS, end - row)
        tiles = (rows + TILE_ROWS - 1) // TILE_ROWS
        for panel in range(panels * part // parts, panels * (part + 1) // parts):
            b, b_scales = weight + panel * panel_bytes, scales + 4 * PANEL * panel
            for tile in range(tiles):
                start = row + rows * tile // tiles
                quad_tile(
                    weights, row + rows * (tile + 1) // tiles - start,
                    x + start * depth, depth, x_scales + 4 * start, x_sums + 4 * start, count,
                    b, b_scales, depth, out + 4 * (start * width + panel * PANEL), width, AHEAD,
                )  # fmt: skip


@inlined
def _quantise_block(x: int, integers: int, size: int) -> Any:
    """Round `size` values to integers up to `LARGEST`; returns their scale, NaN if not all are finite."""
    highest, wrong = _largest(x, size)
    inverse = broadcast(np.float32(LARGEST) / highest if highest > 0 else np.float32(0.0))
    for i in range(0, size, 8):
        store_int16(integers + 2 * i, mul(load(FLOAT32, x + 4 * i), inverse))
    return highest / np.float32(LARGEST) + wrong


@inlined
def _largest(x: int, size: int) -> tuple[Any, Any]:
    """The largest of `size` absolute values, 0 if next to nothing; and 0, or NaN if not all are finite."""
    zeros = broadcast(np.float32(0.0))
    largest, wrong = zeros, zeros
    for i in range(0, size, 8):
        values = load(FLOAT32, x + 4 * i)
        largest = maximum(absolute(values), largest)
        wrong = fma(values, zeros, wrong)
    highest = lane_max(largest)
    return (highest if highest >= SMALLEST else np.float32(0.0)), lane_sum(wrong)


@inlined
def _multiply_part(
    kind: Any, item: int, first_row: int, end_row: int, x: int, x_scales: int, weight: int, scales: int,
    out: int, count: int, depth: int, panels: int, part: int, parts: int,
) -> None:  # fmt: skip
    """Multiply some rows of x, of `item` bytes a value, with a share of the panels, of the given kind."""
    first, end = panels * part // parts, panels * (part + 1) // parts
    for start in range(0, depth, BLOCK_DEPTH):
        size = min(BLOCK_DEPTH, depth - start)
        for row in range(first_row, end_row, BLOCK_ROWS):
            rows = min(BLOCK_ROWS, end_row - row)
            a = x + item * (row * depth + start)
            a_scales = x_scales + 4 * (start // BLOCK_DEPTH * count + row)
            for panel in range(first, end):
                b = weight + kind.itemsize * PANEL * (panel * depth + start)
                b_scales = scales + 4 * PANEL * panel
                c = out + 4 * PANEL * (row * panels + panel)
                if start:
                    _add_block(kind, item, rows, a, depth, a_scales, b, b_scales, size, c, panels * PANEL)
                else:
                    _write_block(kind, item, rows, a, depth, a_scales, b, b_scales, size, c, panels * PANEL)


@kernel
def _write_block(
    kind: Any, item: int, rows: int, a: int, depth: int, a_scales: int, b: int, b_scales: int,
    size: int, c: int, width: int,
) -> None:  # fmt: skip
    """Write the product of `rows` rows of x with a panel, in tiles of nearly equal height."""
    _tiles(kind, item, 1, rows, a, depth, a_scales, b, b_scales, size, c, width)


@kernel
def _add_block(
    kind: Any, item: int, rows: int, a: int, depth: int, a_scales: int, b: int, b_scales: int,
    size: int, c: int, width: int,
) -> None:  # fmt: skip
    """Add the product to what earlier columns gave."""
    _tiles(kind, item, 0, rows, a, depth, a_scales, b, b_scales, size, c, width)


@inlined
def _tiles(
    kind: Any, item: int, fresh: int, rows: int, a: int, depth: int, a_scales: int, b: int, b_scales: int,
    size: int, c: int, width: int,
) -> None:  # fmt: skip
    tiles = (rows + TILE_ROWS - 1) // TILE_ROWS
    for tile in range(tiles):
        row = rows * tile // tiles
        height = rows * (tile + 1) // tiles - row
        at, scale, to = a + item * row * depth, a_scales + 4 * row, c + 4 * row * width
        panel_tile(kind, height, fresh, at, depth, scale, b, b_scales, size, to, width, AHEAD)
