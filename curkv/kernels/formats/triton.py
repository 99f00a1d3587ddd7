"""How Triton kernels read and write keys and values of each format.

A store is a tuple of pointers, those of the format's arrays; its FORMAT is a constant of the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from curkv.kernels.formats.base import Store
from curkv.kernels.formats.int8 import LARGEST
from curkv.kernels.triton_util import dot, narrow, power_of_two

_LARGEST = tl.constexpr(float(LARGEST))


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
    "int8": Operands(torch.bfloat16, widened=True),  # which has all of its numbers
}


def operands_of(store: Store) -> Operands:
    """What dots take of a store's vectors.

    Raises:
        ValueError: Triton's kernels do not know the format.
    """
    if store.format.name not in _OPERANDS:
        raise ValueError(f"Triton's kernels do not know the KV format {store.format.name!r}")
    return _OPERANDS[store.format.name]


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


def pointers(store: Store) -> tuple[torch.Tensor, ...]:
    """The store as kernels take it."""
    operands_of(store)
    return tuple(store.arrays[name] for name in store.format.arrays(store.head_dim))


@triton.jit
def load_tokens(memory, place, mask, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Read rows [tokens, BLOCK_D] at places of an array; 0 where masked and past HEAD_DIM."""
    d = tl.arange(0, BLOCK_D)
    pointers = memory + place[:, None] * HEAD_DIM + d[None, :]
    return tl.load(pointers, mask=mask[:, None] & (d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def load_operands(store, place, mask, FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Read keys or values [tokens, BLOCK_D] as a dot takes them, not yet `scaled`."""
    vectors = load_tokens(store[0], place, mask, HEAD_DIM, BLOCK_D)
    if FORMAT == "int8":
        vectors = narrow(vectors.to(tl.float32), tl.bfloat16)
    return vectors


@triton.jit
def narrow_queries(queries, store, FORMAT: tl.constexpr):
    """Round queries to the type in which a dot takes the store's vectors."""
    return narrow(queries, tl.bfloat16 if FORMAT == "int8" else store[0].dtype.element_ty)


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
        factor = tl.where(largest > 0, _LARGEST / tl.where(largest > 0, largest, 1.0), 0.0)[:, None]
        tl.store(targets, _nearest(first * factor).to(tl.int8), mask=mask)
        tl.store(targets + HALF, _nearest(second * factor).to(tl.int8), mask=mask)
    else:
        tl.store(targets, narrow(first, targets.dtype.element_ty), mask=mask)
        tl.store(targets + HALF, narrow(second, targets.dtype.element_ty), mask=mask)


@triton.jit
def _nearest(x):
    """Round to an integer, to even where two are as near."""
    low = tl.floor(x)
    fraction = x - low
    odd = low - 2 * tl.floor(low / 2)
    return tl.where((fraction > 0.5) | ((fraction == 0.5) & (odd > 0)), low + 1, low)
