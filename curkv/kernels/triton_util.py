"""What the Triton kernels share: dots, rounding, page lookup and block sizes."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime import driver

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
FLOAT32_DOT = tl.constexpr("ieee" if INTERPRETED.value or torch.version.hip else "tf32x3")
"""Precision of float32 dots: NVIDIA's tensor cores make three TF32 products of one, AMD's have float32."""

BOOKS = ("table", "lengths", "slots", "query_start", "positions", "lse")
"""Arguments that are slices, of one number each: where they start says nothing for which to compile anew."""

_LARGEST_FP8 = tl.constexpr(float(torch.finfo(torch.float8_e4m3fn).max))

UNSEEN = tl.constexpr(-1e30)
"""Highest logit of a query that has seen none: finite, lest a block in which it sees none makes NaN."""

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


def power_of_two(n: int) -> int:
    """Smallest power of two that is at least `n`; the size of a block that holds `n` things."""
    return 1 << max(n - 1, 0).bit_length()


def sequence_block(num_sequences: int) -> int:
    """Block that holds every sequence of a batch; few different ones, since each is a compilation."""
    return max(64, power_of_two(num_sequences))


def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors or compute units of a device; few for the interpreter on CPU."""
    return 8 if INTERPRETED.value else _num_processors(driver.active, device.index or 0)


@cache
def _num_processors(active: Any, index: int) -> int:
    return int(active.utils.get_device_properties(index)["multiprocessor_count"])


def is_older_cuda() -> bool:
    """Whether the device has tensor cores without asynchronous matrix products: before Hopper."""
    if INTERPRETED.value:
        return False
    target = driver.active.get_current_target()
    return bool(target.backend == "cuda" and target.arch < 90)


@triton.jit
def dot(a, b, acc):
    """acc + a b, summed in float32.

    Triton's interpreter multiplies the raw bits of bfloat16 operands, so they are widened there.
    """
    if INTERPRETED and a.dtype == tl.bfloat16:
        product = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    elif a.dtype == tl.float32:
        product = tl.dot(a, b, acc, input_precision=FLOAT32_DOT)
    else:
        product = tl.dot(a, b, acc)
    return product


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Round float32 numbers to a dtype, too large ones to the largest that float8e4nv has.

    Triton's interpreter would cut bfloat16 off, and rounds float8e4nv wrongly where that carries.
    """
    if dtype == tl.float8e4nv:
        x = tl.minimum(tl.maximum(x.to(tl.float32), -_LARGEST_FP8), _LARGEST_FP8)
        if INTERPRETED:  # by adding what leaves three bits of a normal number to the right of the point
            power = (x.to(tl.uint32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
            shift = tl.maximum(power, 0.015625) * 1572864.0
            x = (x + shift) - shift
        rounded = x.to(dtype)
    elif INTERPRETED and dtype == tl.bfloat16 and x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        rounded = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        rounded = x.to(dtype)
    return rounded


@triton.jit
def find_slots(row, index, mask, PAGE_SIZE: tl.constexpr):
    """Number int64 of each token's place in the pool, page * PAGE_SIZE + offset.

    `row` points to a head's row of the page table, `index` are indices of tokens in the head.
    """
    page = tl.load(row + index // PAGE_SIZE, mask=mask, other=0)
    return page.to(tl.int64) * PAGE_SIZE + index % PAGE_SIZE


@triton.jit
def find_oldest(position, row, length, WINDOWED: tl.constexpr, window, PAGE_SIZE: tl.constexpr):
    """Index of the first token of a head that its newest one has in its window; 0 without one.

    `position` points to the pages' positions, by which the tokens are sorted.
    """
    low = tl.minimum(length, 0)
    if WINDOWED:
        high = tl.maximum(length - 1, 0)
        newest = tl.load(position + find_slots(row, high, length > 0, PAGE_SIZE), mask=length > 0, other=0)
        while low < high:
            middle = (low + high) // 2
            seen = tl.load(position + find_slots(row, middle, length > 0, PAGE_SIZE)) > newest - window
            low = tl.where(seen, low, middle + 1)
            high = tl.where(seen, middle, high)
    return low


@triton.jit
def softcapped(logits, SOFTCAPPED: tl.constexpr, softcap):
    """softcap tanh(logits / softcap); both in units of base-2 logits."""
    if SOFTCAPPED:
        logits = softcap * (1 - 2 / (tl.exp2(logits * (2 * LOG2_E / softcap)) + 1))
    return logits


@triton.jit
def find_sequence(query_start, tile, num_sequences, TILE: tl.constexpr, BLOCK_B: tl.constexpr):
    """Sequence of a tile of up to TILE queries, when sequence b's tiles begin at query_start[b] // TILE + b.

    T // TILE + B tiles are enough for B sequences of T queries together, however they are divided: the grid
    needs no look at the lengths. A tile may turn out to be past its sequence's end.
    """
    b = tl.arange(0, BLOCK_B)
    starts = tl.load(query_start + b, mask=b < num_sequences, other=0)
    before = (b < num_sequences) & (starts // TILE + b <= tile)
    return tl.sum(before.to(tl.int32), 0) - 1
