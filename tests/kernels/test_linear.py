"""The packed CPU linear layers give what torch gives."""

import numba
import pytest
import torch
from llvmlite import binding
from torch import Tensor

from curkv.kernels.linear import cpu, reference
from curkv.kernels.simd import INT8, panel_tile

TOLERANCE = {"pack_linear": 1e-5, "pack_linear_int8": 1e-4}
"""Relative RMS error to the same weights in torch; int8 ones are multiplied with x in about 15 bits."""

PACKS = tuple(TOLERANCE)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "depth"), [(16, 8), (1, 1), (37, 577), (960, 576), (192, 1536)])
@pytest.mark.parametrize("tokens", [0, 1, 2, 5, 6, 7, 8, 97, 200])
@pytest.mark.parametrize("pack", PACKS)
def test_agrees_with_torch(pack: str, tokens: int, rows: int, depth: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(tokens + rows)
    weight = torch.randn(rows, depth, generator=generator)
    offset = torch.randn(rows, generator=generator) if bias else None
    x = torch.randn(tokens, depth, generator=generator)
    expected = getattr(reference, pack)(weight, offset)(x)
    actual = getattr(cpu, pack)(weight, offset)(x)
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= TOLERANCE[pack] * expected.norm()


@pytest.mark.parametrize("pack", PACKS)
def test_a_row_does_not_depend_on_the_batch_it_is_in(pack: str) -> None:
    weight, x = torch.randn(64, 600), torch.randn(100, 600)
    layer = getattr(cpu, pack)(weight)
    alone = torch.cat([layer(row[None]) for row in x])
    assert torch.equal(layer(x), alone)


@pytest.mark.parametrize("rows", [16, 37])
def test_rows_are_rounded_in_steps_of_a_127th_of_their_largest_value(rows: int) -> None:
    weight = torch.randn(rows, 40) * torch.logspace(-3, 3, rows)[:, None]
    integers, scales = reference.quantise(weight)
    assert integers.abs().amax(dim=1).tolist() == [127] * rows
    assert ((weight - integers * scales[:, None]).abs() <= 0.501 * scales[:, None]).all()


def test_rows_of_zeros_give_zeros() -> None:
    weight, x = torch.randn(20, 24), torch.randn(7, 24)
    weight[3] = 0
    x[5] = 0
    out = cpu.pack_linear_int8(weight)(x)
    assert (out[:, 3] == 0).all()
    assert (out[5] == 0).all()
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_gives_nan_and_spares_the_others(broken: float) -> None:
    weight, x = torch.randn(33, 600), torch.randn(8, 600)
    layer = cpu.pack_linear_int8(weight)
    expected = layer(x)
    x[2, 590] = broken
    out = layer(x)
    assert out[2].isnan().all()
    assert torch.equal(without(out, 2), without(expected, 2))


def without(rows: Tensor, index: int) -> Tensor:
    return torch.cat([rows[:index], rows[index + 1 :]])


@pytest.mark.parametrize("size", [1e-38, 1e-20, 1e20, 1e36])
def test_rows_of_any_size_are_multiplied(size: float) -> None:
    weight, x = torch.randn(16, 64), torch.randn(1, 64)
    expected = reference.pack_linear_int8(weight)(x)
    error = cpu.pack_linear_int8(weight)(x * size) / size - expected
    assert error.norm() <= (1e-4 if size > 1e-29 else 1) * expected.norm()  # next to nothing is nothing


def test_the_largest_sums_fit() -> None:
    depth = 2 * cpu.BLOCK_DEPTH
    weight, x = torch.ones(16, depth), torch.ones(1, depth)
    weight[1] = -1
    out = cpu.pack_linear_int8(weight)(x)
    assert out[0, :2].tolist() == pytest.approx([depth, -depth], rel=1e-5)


@pytest.mark.parametrize("pack", PACKS)
def test_bytes_are_those_of_the_padded_weight(pack: str) -> None:
    weight, bias = torch.randn(20, 12), torch.randn(20)
    expected = {"pack_linear": 4 * 32 * 12 + 80, "pack_linear_int8": 32 * 16 + 4 * 32 + 80}
    assert getattr(cpu, pack)(weight, bias).nbytes == expected[pack]


@pytest.mark.skipif(not binding.get_host_cpu_features().get("avx2"), reason="the instruction is x86's")
def test_pairs_are_multiplied_by_one_instruction() -> None:
    @numba.njit("void(int64)")  # not cached: code from the cache cannot be looked at
    def tile(place: int) -> None:
        panel_tile(INT8, 6, 1, place, 8, place, place, place, 8, place, 16, 0)

    machine_code = "".join(tile.inspect_asm().values())
    assert "vpmaddwd" in machine_code or "vpdpwssd" in machine_code
    assert "vpmulld" not in machine_code
