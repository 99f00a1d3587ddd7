"""How Triton kernels read and write keys and values of each format.

A store is a tuple of pointers, those of the format's arrays; its FORMAT, of `layout_of`, is a constant of the
kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from curkv.kernels.formats import int4, int8
from curkv.kernels.formats.base import Store
from curkv.kernels.pages import Pages
from curkv.kernels.triton_util import LOG2_E, dot, narrow, power_of_two

_LARGEST = tl.constexpr(float(int8.LARGEST))
_LARGEST_CODE = tl.constexpr(float(int4.LARGEST))
_GROUP = tl.constexpr(int4.GROUP)
_SCALED = tl.constexpr(int8.GROUP)


@dataclass(frozen=True)
class Operands:
    """What dots take of a format.

    Attributes:
        dtype: Of the operands.
        widened: Whether they are made of smaller numbers, which take registers until then.
    """

    dtype: torch.dtype
    widened: bool = False


_OPERANDS = {
    "float32": Operands(torch.float32),
    "bfloat16": Operands(torch.bfloat16),
    "float16": Operands(torch.float16),
    "fp8": Operands(
        torch.float16, widened=True
    ),  # which has all of its numbers, as an instruction makes them
    "int8": Operands(torch.bfloat16, widened=True),  # which has all of its numbers
    "int8 in groups": Operands(torch.float16, widened=True),  # times their scales
    "int4": Operands(torch.float16, widened=True),  # the type of its steps and lowest values
}


def layout_of(store: Store) -> str:
    """What kernels tell apart: a format, or one of the two that vectors of int8 have."""
    grouped = store.format.name == "int8" and int8.scales_of(store.head_dim) > 1
    return "int8 in groups" if grouped else store.format.name


def operands_of(store: Store) -> Operands:
    """What dots take of a store's vectors.

    Raises:
        ValueError: Triton's kernels do not know the format.
    """
    if layout_of(store) not in _OPERANDS:
        raise ValueError(f"Triton's kernels do not know the KV format {store.format.name!r}")
    return _OPERANDS[layout_of(store)]


def operand_bytes(store: Store) -> int:
    """Bytes of a vector as a dot takes it."""
    return power_of_two(store.head_dim) * operands_of(store).dtype.itemsize


def attention_block(store: Store, tokens: int, tile_bytes: int) -> int:
    """Tokens per block of keys, a power of two up to `tokens`: as many as keep a tile within `tile_bytes`.

    What is widened is held as it was read too.
    """
    read = power_of_two(store.head_dim) if operands_of(store).widened else 0
    fitting = tile_bytes // (operand_bytes(store) + read)
    return max(16, min(tokens, power_of_two(fitting + 1) // 2))


def pointers(store: Store) -> tuple[Tensor, ...]:
    """The store as kernels take it; a group's step and lowest value are a word of 32 bits."""
    operands_of(store)
    arrays = ((name, store.arrays[name]) for name in store.format.arrays(store.head_dim))
    return tuple(x.view(torch.int32) if name == "ranges" else x for name, x in arrays)


def attention_constants(
    pages: Pages, group: int, window: int | None, softcap: float | None, sinks: Tensor | None
) -> dict[str, Any]:
    """What kernels that attend to pages are compiled for: formats and shapes, and which masks there are."""
    head_dim = pages.k.head_dim
    return {
        "KEYS": layout_of(pages.k),
        "VALUES": layout_of(pages.v),
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "PAGE_SIZE": pages.page_size,
        "BLOCK_D": power_of_two(head_dim),
        "WINDOWED": window is not None,
        "SOFTCAPPED": softcap is not None,
        "SINKS": sinks is not None,
    }


def attention_masks(
    pages: Pages, window: int | None, softcap: float | None, sinks: Tensor | None, unused: Tensor
) -> tuple[Tensor, int, float, Tensor]:
    """What these masks are, as the kernels take them; `unused` stands for sinks that are not there."""
    return pages.position, window or 0, (softcap or 0.0) * LOG2_E.value, unused if sinks is None else sinks


@triton.jit
def load_tokens(memory, place, mask, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Read rows [tokens, BLOCK_D] at places of an array; 0 where masked and past HEAD_DIM."""
    d = tl.arange(0, BLOCK_D)
    pointers = memory + place[:, None] * HEAD_DIM + d[None, :]
    return tl.load(pointers, mask=mask[:, None] & (d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def load_operands(store, place, mask, FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Read keys or values [tokens, BLOCK_D] as a dot takes them, not yet `scaled`."""
    if FORMAT == "int4":
        vectors = _load_nibbles(store, place, mask, HEAD_DIM, BLOCK_D)
    elif FORMAT == "int8 in groups":
        vectors = _load_bytes(store, place, mask, HEAD_DIM, BLOCK_D)
    else:
        vectors = load_tokens(store[0], place, mask, HEAD_DIM, BLOCK_D)
    if FORMAT == "int8":
        vectors = narrow(vectors.to(tl.float32), tl.bfloat16)
    elif FORMAT == "fp8":
        vectors = vectors.to(tl.float16)
    return vectors


@triton.jit
def _load_bytes(store, place, mask, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Read integers, times their groups' scales."""
    integers = load_tokens(store[0], place, mask, HEAD_DIM, BLOCK_D).to(tl.float32)
    scales = load_tokens(store[1], place, mask, HEAD_DIM // _SCALED, BLOCK_D // _SCALED)
    groups = tl.reshape(integers, [integers.shape[0], BLOCK_D // _SCALED, _SCALED]) * scales[:, :, None]
    return tl.reshape(groups, [integers.shape[0], BLOCK_D]).to(tl.float16)


@triton.jit
def _load_nibbles(store, place, mask, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Read codes, times their groups' steps and plus their lowest values."""
    pairs = load_tokens(store[0], place, mask, HEAD_DIM // 2, BLOCK_D // 2)
    codes = tl.interleave(pairs & 15, pairs >> 4).to(tl.float32)
    ranges = load_tokens(store[1], place, mask, HEAD_DIM // _GROUP, BLOCK_D // _GROUP)
    step = ranges.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    low = (ranges >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    groups = tl.reshape(codes, [codes.shape[0], BLOCK_D // _GROUP, _GROUP])
    vectors = groups * step[:, :, None] + low[:, :, None]
    return tl.reshape(vectors, [codes.shape[0], BLOCK_D]).to(tl.float16)


@triton.jit
def narrow_queries(queries, store, FORMAT: tl.constexpr):
    """Round queries to the type in which a dot takes the store's vectors."""
    if FORMAT == "int8":
        queries = narrow(queries, tl.bfloat16)
    elif FORMAT == "int8 in groups" or FORMAT == "int4" or FORMAT == "fp8":
        queries = narrow(queries, tl.float16)
    else:
        queries = narrow(queries, store[0].dtype.element_ty)
    return queries


@triton.jit
def scaled(x, store, place, mask, FORMAT: tl.constexpr):
    """Multiply the columns of x [M, tokens] by the scales of these tokens' vectors, if they have any."""
    if FORMAT == "int8":
        x = x * tl.load(store[1] + place, mask=mask, other=0.0)[None, :]
    return x


@triton.jit
def scaled_energies(energies, store, place, mask, FORMAT: tl.constexpr):
    """Multiply energies [tokens], quadratic in these tokens' vectors, by the scales' squares."""
    if FORMAT == "int8":
        scale = tl.load(store[1] + place, mask=mask, other=0.0)
        energies = energies * scale * scale
    return energies


@triton.jit
def softmax_step(logits, values, store, place, valid, peak, total, acc, FORMAT: tl.constexpr):
    """Fold a block of base-2 logits [M, N] and values [N, D] into a running softmax.

    `store` is that of the values, and `place` [N] where those of `valid` tokens lie. `peak` [M] is the
    highest logit so far, `total` [M] the sum of 2^(logit - peak), `acc` [M, D] the weighted values. Every row
    must have seen a finite logit by the end of the block.
    """
    new_peak = tl.maximum(peak, tl.max(logits, 1))
    weights = tl.exp2(logits - new_peak[:, None])
    decay = tl.exp2(peak - new_peak)
    total = total * decay + tl.sum(weights, 1)
    weights = scaled(weights, store, place, valid, FORMAT)
    acc = dot(narrow(weights, values.dtype), values, acc * decay[:, None])
    return new_peak, total, acc


@triton.jit
def write(first, second, store, place, valid, mask, i, FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Write vectors whose halves are [heads, HALF] float32, the channels `i` and those HALF later."""
    HALF: tl.constexpr = HEAD_DIM // 2
    targets = store[0] + place[:, None] * HEAD_DIM + i[None, :]
    if FORMAT == "int8":
        largest = tl.maximum(tl.max(tl.abs(first), 1), tl.max(tl.abs(second), 1))
        tl.store(store[1] + place, largest / _LARGEST, mask=valid)
        factor = _share(_LARGEST, largest)[:, None]
        tl.store(targets, nearest(first * factor).to(tl.int8), mask=mask)
        tl.store(targets + HALF, nearest(second * factor).to(tl.int8), mask=mask)
    elif FORMAT == "int8 in groups":
        _write_bytes(first, store, place, valid, 0, HEAD_DIM)
        _write_bytes(second, store, place, valid, HALF, HEAD_DIM)
    elif FORMAT == "int4":
        _write_nibbles(first, store, place, valid, 0, HEAD_DIM)
        _write_nibbles(second, store, place, valid, HALF, HEAD_DIM)
    else:
        tl.store(targets, narrow(first, targets.dtype.element_ty), mask=mask)
        tl.store(targets + HALF, narrow(second, targets.dtype.element_ty), mask=mask)


@triton.jit
def _write_bytes(x, store, place, valid, FIRST: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Write half of the channels [heads, HALF] of vectors, from FIRST on, in whole groups."""
    HEADS: tl.constexpr = x.shape[0]
    GROUPS: tl.constexpr = x.shape[1] // _SCALED
    groups = tl.reshape(x, [HEADS, GROUPS, _SCALED])
    largest = tl.max(tl.abs(groups), 2)
    g = tl.arange(0, GROUPS)
    target = store[1] + place[:, None] * (HEAD_DIM // _SCALED) + (g + FIRST // _SCALED)[None, :]
    tl.store(target, largest / _LARGEST, mask=valid[:, None] & (g < HEAD_DIM // 2 // _SCALED)[None, :])
    integers = tl.reshape(nearest(groups * _share(_LARGEST, largest)[:, :, None]), [HEADS, GROUPS * _SCALED])
    i = tl.arange(0, GROUPS * _SCALED)
    target = store[0] + place[:, None] * HEAD_DIM + (i + FIRST)[None, :]
    tl.store(target, integers.to(tl.int8), mask=valid[:, None] & (i < HEAD_DIM // 2)[None, :])


@triton.jit
def _write_nibbles(x, store, place, valid, FIRST: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Write half of the channels [heads, HALF] of vectors, from FIRST on, in whole groups."""
    HEADS: tl.constexpr = x.shape[0]
    GROUPS: tl.constexpr = x.shape[1] // _GROUP
    groups = tl.reshape(x, [HEADS, GROUPS, _GROUP])
    high, low = tl.max(groups, 2), tl.min(groups, 2)
    step = ((high - low) / _LARGEST_CODE).to(tl.float16)
    low = low.to(tl.float16)
    g = tl.arange(0, GROUPS)
    word = low.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
    word = (word | step.to(tl.uint16, bitcast=True).to(tl.uint32)).to(tl.int32, bitcast=True)
    target = store[1] + place[:, None] * (HEAD_DIM // _GROUP) + (g + FIRST // _GROUP)[None, :]
    tl.store(target, word, mask=valid[:, None] & (g < HEAD_DIM // 2 // _GROUP)[None, :])
    step = step.to(tl.float32)
    factor = _share(1.0, step)
    codes = nearest((groups - low.to(tl.float32)[:, :, None]) * factor[:, :, None])
    codes = tl.minimum(tl.maximum(codes, 0.0), _LARGEST_CODE).to(tl.uint8)
    even, odd = tl.split(tl.reshape(codes, [HEADS, GROUPS * _GROUP // 2, 2]))
    i = tl.arange(0, GROUPS * _GROUP // 2)
    target = store[0] + place[:, None] * (HEAD_DIM // 2) + (i + FIRST // 2)[None, :]
    tl.store(target, even | (odd << 4), mask=valid[:, None] & (i < HEAD_DIM // 4)[None, :])


@triton.jit
def _share(part, whole):
    """Divide, with 0 where the whole is 0."""
    return tl.where(whole > 0, part / tl.where(whole > 0, whole, 1.0), 0.0)


@triton.jit
def nearest(x):
    """Round to an integer, to even where two are as near."""
    low = tl.floor(x)
    fraction = x - low
    odd = low - 2 * tl.floor(low / 2)
    return tl.where((fraction > 0.5) | ((fraction == 0.5) & (odd > 0)), low + 1, low)
