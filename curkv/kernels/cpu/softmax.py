"""Powers of two and the two passes of a softmax over a row of scores."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from curkv.kernels.cpu.features import MULTIPLIES_BFLOAT16
from curkv.kernels.cpu.jit import inlined, intrinsic
from curkv.kernels.cpu.lanes import (
    add,
    broadcast,
    float32x8,
    fma,
    keep_first,
    lane_max,
    lane_sum,
    maximum,
    mul,
)
from curkv.kernels.cpu.llvm import F32X8, I8, I32, I32X8, ROUNDER, Args, call, constant, multiply_add
from curkv.kernels.cpu.memory import FLOAT32, load, store, store_scalar

# 2^f on [-1/2, 1/2], least largest relative error (7.5e-8; 2.1e-7 with float32 rounding).
_EXP2 = (1.0000000716543658, 0.6931469670549113, 0.24022119724872848,
         0.0555071328958381, 0.00967554129296315, 0.001327646679244232)  # fmt: skip
# The same on [0, 1] (7.5e-5, a fiftieth of what bfloat16 rounds off).
_COARSE_EXP2 = (0.9999252183, 0.6958335393, 0.2260671587, 0.0780245207)
_FLOOR = 1  # x86's number of that way of rounding
# tanh x = x P(x^2) / Q(x^2) on [-9, 9], beyond which it is 1: least largest relative error (2e-8; 3.4e-7 with
# float32 rounding).
_TANH_LIMIT = 9.0
_TANH_P = (0.9999999796596604, 0.1338098121124381, 0.0034955347101727732, 2.060819247360002e-05,
           1.335343232509807e-08)  # fmt: skip
_TANH_Q = (1.0, 0.46714296874070876, 0.02587678046202279, 0.00032855468150893365, 7.776053267844581e-07)


@intrinsic
def exp2(context: Any, kind: Any, a: Any) -> Any:
    """Lane by lane 2^a for a <= 127, as exact as values of the kind are; below -126 next to nothing."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        coarse = MULTIPLIES_BFLOAT16 and signature.args[0].dtype == types.int16
        return (_coarse_exp2 if coarse else _exp2)(builder, args[1])

    return float32x8(kind, float32x8), generate


def _exp2(builder: ir.IRBuilder, a: ir.Value) -> ir.Value:
    lowest = constant(F32X8, -126.0)
    x = builder.select(builder.fcmp_ordered(">", a, lowest), a, lowest)
    shifted = builder.fadd(x, constant(F32X8, ROUNDER))
    fraction = builder.fsub(x, builder.fsub(shifted, constant(F32X8, ROUNDER)))
    power = builder.bitcast(_polynomial(builder, _EXP2, fraction), I32X8)
    exponent = builder.shl(builder.bitcast(shifted, I32X8), constant(I32X8, 23))
    return builder.bitcast(builder.add(power, exponent), F32X8)


def _coarse_exp2(builder: ir.IRBuilder, a: ir.Value) -> ir.Value:
    """By AVX-512, which every machine that multiplies bfloat16 has: x - floor(x), and p 2^floor(x)."""
    every, name = I8(-1), "llvm.x86.avx512.mask.{}.ps.256"
    fraction = call(builder, name.format("reduce"), F32X8, [a, I32(_FLOOR), a, every])
    power = _polynomial(builder, _COARSE_EXP2, fraction)
    return call(builder, name.format("scalef"), F32X8, [power, a, power, every])


def _polynomial(builder: ir.IRBuilder, coefficients: tuple[float, ...], x: ir.Value) -> ir.Value:
    value = constant(F32X8, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = multiply_add(builder, value, x, constant(F32X8, coefficient))
    return value


@intrinsic
def tanh(context: Any, a: Any) -> Any:
    """Lane by lane the hyperbolic tangent."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        low, high = constant(F32X8, -_TANH_LIMIT), constant(F32X8, _TANH_LIMIT)
        x = builder.select(builder.fcmp_ordered(">", args[0], low), args[0], low)
        x = builder.select(builder.fcmp_ordered("<", x, high), x, high)
        square = builder.fmul(x, x)
        above = builder.fmul(x, _polynomial(builder, _TANH_P, square))
        return builder.fdiv(above, _polynomial(builder, _TANH_Q, square))

    return float32x8(float32x8), generate


@inlined
def row_softcap(scores: int, count: int, ceiling: float) -> None:
    """Replace `count` floats x by ceiling tanh(x / ceiling), up to seven more by anything."""
    most, share = broadcast(np.float32(ceiling)), broadcast(np.float32(1.0 / ceiling))
    for j in range(0, count, 8):
        store(FLOAT32, scores + 4 * j, mul(tanh(mul(load(FLOAT32, scores + 4 * j), share)), most))


@inlined
def hide_first(scores: int, count: int) -> None:
    """Replace `count` floats by -inf, of which no power is more than next to nothing."""
    for j in range(count):
        store_scalar(FLOAT32, scores + 4 * j, np.float32(-np.inf))


@inlined
def row_max(scores: int, count: int) -> Any:
    """The largest of `count` floats, -inf without any; up to seven more are read and ignored."""
    lowest = broadcast(np.float32(-np.inf))
    best = lowest
    body = count - count % 8
    for j in range(0, body, 8):
        best = maximum(load(FLOAT32, scores + 4 * j), best)
    if body < count:
        best = maximum(keep_first(load(FLOAT32, scores + 4 * body), count - body, lowest), best)
    return lane_max(best)


@inlined
def row_exp2(kind: Any, scores: int, count: int, width: int, factor: float, highest: float) -> Any:
    """Replace `count` floats x by 2^(factor (x - highest)), and those up to `width`, a multiple of 8, by 0.

    They are written as `kind`, from the same address on.

    Returns:
        The sum of the powers.
    """
    spread = broadcast(np.float32(factor))
    shift = broadcast(np.float32(-factor * highest))
    zeros = broadcast(np.float32(0.0))
    total = zeros
    body = count - count % 8
    for j in range(0, body, 8):
        power = exp2(kind, fma(load(FLOAT32, scores + 4 * j), spread, shift))
        store(kind, scores + kind.itemsize * j, power)
        total = add(total, power)
    if body < count:
        power = exp2(kind, fma(load(FLOAT32, scores + 4 * body), spread, shift))
        power = keep_first(power, count - body, zeros)
        store(kind, scores + kind.itemsize * body, power)
        total = add(total, power)
        body += 8
    for j in range(body, width, 8):
        store(kind, scores + kind.itemsize * j, zeros)
    return lane_sum(total)
