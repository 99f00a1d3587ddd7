"""What the Triton kernels share: dots, page lookup, the softmax's running state and block sizes."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
FLOAT32_DOT = tl.constexpr("ieee" if INTERPRETED.value or torch.version.hip else "tf32x3")
"""Precision of float32 dots: NVIDIA's tensor cores make three TF32 products of one, AMD's have float32."""

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


def power_of_two(n: int) -> int:
    """Smallest power of two that is at least `n`; the size of a block that holds `n` things."""
    return 1 << max(n - 1, 0).bit_length()


def sequence_block(num_sequences: int) -> int:
    """Block that holds every sequence of a batch; few different ones, since each is a compilation."""
    return max(64, power_of_two(num_sequences))


def attention_block(pages_k: Tensor, tokens: int, tile_bytes: int) -> int:
    """Tokens per block of keys, a power of two up to `tokens`: as many as keep a tile within `tile_bytes`.

    Keys of int8 are held as they were read and widened.
    """
    widened = power_of_two(pages_k.shape[2]) if pages_k.element_size() == 1 else 0
    fitting = tile_bytes // (operand_bytes(pages_k) + widened)
    return max(16, min(tokens, power_of_two(fitting + 1) // 2))


def operand_bytes(pages_k: Tensor) -> int:
    """Bytes of a key as a dot takes it: int8 is widened to 16 bits."""
    return power_of_two(pages_k.shape[2]) * max(2, pages_k.element_size())


@cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors or compute units of a device; few for the interpreter on CPU."""
    if device.type == "cpu":
        return 8
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


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
    """Round float32 numbers to a dtype; Triton's interpreter would cut bfloat16 off."""
    if INTERPRETED and dtype == tl.bfloat16 and x.dtype == tl.float32:
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
def load_tokens(memory, place, mask, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Read keys or values [tokens, BLOCK_D] at places of the pool; 0 where masked and past HEAD_DIM."""
    d = tl.arange(0, BLOCK_D)
    pointers = memory + place[:, None] * HEAD_DIM + d[None, :]
    return tl.load(pointers, mask=mask[:, None] & (d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def operands(vectors):
    """Stored vectors as a dot takes them: int8 as bfloat16, which has all of its numbers."""
    if vectors.dtype == tl.int8:
        vectors = narrow(vectors.to(tl.float32), tl.bfloat16)
    return vectors


@triton.jit
def narrow_queries(queries, pages):
    """Round queries to the type in which a dot takes the pages' vectors."""
    if pages.dtype.element_ty == tl.int8:
        rounded = narrow(queries, tl.bfloat16)
    else:
        rounded = narrow(queries, pages.dtype.element_ty)
    return rounded


@triton.jit
def scaled(x, scales, place, mask):
    """Multiply the columns of x [M, tokens] by their scales in the pool; as they are if there are none."""
    if scales is not None:
        x = x * tl.load(scales + place, mask=mask, other=0.0)[None, :]
    return x


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


@triton.jit
def softmax_step(logits, values, v_scale, place, valid, peak, total, acc):
    """Fold a block of base-2 logits [M, N] and values [N, D] into a running softmax.

    `v_scale` are the scales in the pool, if there are any, and `place` [N] where those of `valid` tokens lie.
    `peak` [M] is the highest logit so far, `total` [M] the sum of 2^(logit - peak), `acc` [M, D] the weighted
    values. Every row must have seen a finite logit by the end of the block.
    """
    new_peak = tl.maximum(peak, tl.max(logits, 1))
    weights = tl.exp2(logits - new_peak[:, None])
    decay = tl.exp2(peak - new_peak)
    total = total * decay + tl.sum(weights, 1)
    weights = scaled(weights, v_scale, place, valid)
    acc = dot(narrow(weights, values.dtype), values, acc * decay[:, None])
    return new_peak, total, acc
