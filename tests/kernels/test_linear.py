"""The packed CPU linear layers give what torch gives."""

import random

import numba
import numpy as np
import pytest
import torch
from llvmlite import binding
from torch import Tensor

from curkv.kernels.cpu.features import MULTIPLIES_QUADS
from curkv.kernels.cpu.memory import INT8
from curkv.kernels.cpu.quads import NIBBLES, NIBBLES_BY_ANY, NIBBLES_BY_AVX2, OWN_NIBBLES
from curkv.kernels.cpu.tiles import panel_tile
from curkv.kernels.linear import cpu, formats, reference
from curkv.kernels.linear.spec import Packed
from curkv.kernels.linear.stored import Bytes, StoredRows, Stretch
from curkv.kernels.rms_norm.cpu import rms_norm
from curkv.kernels.silu_mul.cpu import silu_mul

FEATURES = binding.get_host_cpu_features()
NIBBLE_FORMS = {"nibbles": NIBBLES, "nibbles by AVX2": NIBBLES_BY_AVX2, "nibbles by any": NIBBLES_BY_ANY}
RUNNING = {
    "pairs": True,
    "quads": MULTIPLIES_QUADS,
    "nibbles": MULTIPLIES_QUADS,
    "nibbles by AVX2": FEATURES.get("avx2"),
    "nibbles by any": True,
}
TOLERANCE = {"float32": 1e-5, "pairs": 1e-4} | dict.fromkeys(("quads", *NIBBLE_FORMS), 1e-2)
"""Relative RMS error to the same weights in torch; integers are multiplied with x in 15 bits or in 8."""

INTEGERS = tuple(name for name, runs in RUNNING.items() if runs)
PACKS = ("float32", *INTEGERS)


def pack_cpu(name: str, weight: Tensor | Packed, bias: Tensor | None = None) -> cpu.PackedLinear:
    if name == "float32":
        return cpu.pack_linear(weight, bias)
    if name in NIBBLE_FORMS:
        return cpu.NibbleLinear(weight, bias, NIBBLE_FORMS[name])
    return cpu.PairLinear(weight, bias) if name == "pairs" else cpu.QuadLinear(weight, bias)


def pack_reference(name: str, weight: Tensor, bias: Tensor | None = None) -> reference.ReferenceLinear:
    if name in NIBBLE_FORMS:
        return reference.pack_linear(weight, bias, formats.INT4)
    return reference.pack_linear(weight, bias, formats.FLOAT32 if name == "float32" else formats.INT8)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "depth"), [(16, 8), (1, 1), (37, 577), (960, 576), (192, 1536)])
@pytest.mark.parametrize("tokens", [0, 1, 2, 5, 6, 7, 8, 97, 200])
@pytest.mark.parametrize("pack", PACKS)
def test_agrees_with_torch(pack: str, tokens: int, rows: int, depth: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(tokens + rows)
    weight = torch.randn(rows, depth, generator=generator)
    offset = torch.randn(rows, generator=generator) if bias else None
    x = torch.randn(tokens, depth, generator=generator)
    expected = pack_reference(pack, weight, offset)(x)
    actual = pack_cpu(pack, weight, offset)(x)
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= TOLERANCE[pack] * expected.norm()


@pytest.mark.parametrize("depth", [64, 600])  # of which only one is a multiple of 32
@pytest.mark.parametrize("tokens", [0, 1, 100])
@pytest.mark.parametrize("pack", PACKS)
def test_what_goes_before_gives_the_same_within_the_layer_as_alone(
    pack: str, tokens: int, depth: int
) -> None:
    layer = pack_cpu(pack, torch.randn(48, depth), torch.randn(48))
    x, residual, gate_up = (torch.randn(tokens, n * depth) for n in (1, 1, 2))
    weight = torch.randn(depth)
    normed, total = rms_norm(x, weight, 1e-5, residual)
    out, same_total = layer.after_rms_norm(x, weight, 1e-5, residual)
    assert torch.equal(out, layer(normed))
    assert torch.equal(same_total, total)
    out, same_total = layer.after_rms_norm(x, weight, 1e-5)
    assert torch.equal(out, layer(rms_norm(x, weight, 1e-5)))
    assert torch.equal(same_total, x)
    assert torch.equal(layer.after_silu_mul(gate_up), layer(silu_mul(gate_up)))


@pytest.mark.parametrize("pack", PACKS)
def test_a_row_does_not_depend_on_the_batch_it_is_in(pack: str) -> None:
    weight, x = torch.randn(64, 600), torch.randn(100, 600)
    layer = pack_cpu(pack, weight)
    alone = torch.cat([layer(row[None]) for row in x])
    assert torch.equal(layer(x), alone)


@pytest.mark.parametrize("rows", [16, 37])
def test_rows_are_rounded_in_steps_of_a_127th_of_their_largest_value(rows: int) -> None:
    weight = torch.randn(rows, 40) * torch.logspace(-3, 3, rows)[:, None]
    integers, scales = formats.quantise(weight)
    assert integers.abs().amax(dim=1).tolist() == [127] * rows
    assert ((weight - integers * scales[:, None]).abs() <= 0.501 * scales[:, None]).all()


def test_weights_on_a_grid_of_16_values_are_not_changed_by_int4() -> None:
    steps, lows = torch.rand(24, 3).half().float(), -torch.rand(24, 3).half().float()
    grid = torch.randint(0, 16, (24, 3, 32))
    grid[..., 0], grid[..., 1] = 0, 15
    weight = (grid * steps[..., None] + lows[..., None]).flatten(1)
    integers, found_steps, found_lows = formats.quantise_int4(weight)
    assert torch.equal(integers, grid.flatten(1).to(torch.uint8))
    assert torch.equal(found_steps.float(), steps)
    assert torch.equal(found_lows.float(), lows)


def test_groups_that_lack_values_of_their_grid_are_not_changed_by_int4() -> None:
    """llama.cpp's Q4_0 and Q4_K have such; the lowest of 16 values is not the lowest weight there."""
    steps = torch.rand(24, 8).half().float()[..., None] + 0.01
    weight = ((torch.randint(2, 13, (24, 8, 32)) - 8) * steps).flatten(1)
    integers, found, offsets = formats.quantise_int4(weight)
    rounded = (integers.view(24, 8, 32) * found.float()[..., None] + offsets.float()[..., None]).flatten(1)
    assert ((rounded - weight).view(24, 8, 32).abs() < 0.02 * steps).all()
    assert formats.on_int4_grid(weight)
    assert not formats.on_int4_grid(weight + 0.05 * torch.randn_like(weight))


def stored(weight: Tensor, *sizes: int, grids: bool = False) -> StoredRows:
    """A weight as if it lay in a file: stretches of so many rows, of float32."""

    def decode(rows: Bytes) -> Tensor:
        return torch.from_numpy(rows.view(np.float32).copy())

    known = (lambda rows: formats.quantise_int4(decode(rows))) if grids else None
    parts = weight.contiguous().view(torch.uint8).split(sizes)
    return StoredRows([Stretch(part.numpy(), decode, known) for part in parts], weight.shape[1])


def test_rows_of_a_stored_weight_are_those_of_its_values() -> None:
    weight, rng = torch.randn(23, 8), random.Random(0)
    whole = torch.cat([stored(weight[:12], 5, 7), stored(weight[12:], 1, 10)])
    assert isinstance(whole, StoredRows) and whole.shape == weight.shape
    for _ in range(300):
        rows = slice(rng.randrange(24), rng.randrange(30), rng.randint(1, 7))
        assert isinstance(whole[rows], StoredRows)
        assert torch.equal(whole[rows].clone(), weight[rows])
    assert torch.equal(whole * 2, weight * 2) and torch.equal(whole.T @ whole, weight.T @ weight)
    assert torch.equal(torch.cat([whole, weight]), torch.cat([weight, weight]))


@pytest.mark.parametrize("rows", [16, 37])
@pytest.mark.parametrize("form", [formats.INT8, formats.INT4, formats.FLOAT32])
def test_a_stored_weight_is_packed_as_its_values_are(form: formats.WeightFormat, rows: int) -> None:
    weight = torch.randn(rows, 64)
    expected = cpu.pack_linear(weight, None, form).packed
    for grids in (False, True):
        packed = cpu.pack_linear(stored(weight, 9, rows - 9, grids=grids), None, form).packed
        assert torch.equal(packed.panels[: rows // 16], expected.panels[: rows // 16])
        x = torch.randn(3, 64)
        assert torch.equal(cpu.pack_linear(packed, None, form)(x), cpu.pack_linear(expected, None, form)(x))


def test_weights_are_stored_as_they_were_published() -> None:
    weight = torch.randn(48, 64)
    rounded = reference.pack_linear(weight, None, formats.INT4).weight
    assert formats.AS_PUBLISHED.of(weight) is formats.INT8
    assert formats.AS_PUBLISHED.of(rounded) is formats.INT4
    half_of_it = torch.cat([rounded, weight[:8]])
    assert formats.AS_PUBLISHED.of(half_of_it) is formats.INT8
    assert formats.AS_PUBLISHED.of_head is formats.INT8


@pytest.mark.parametrize(("rows", "depth"), [(16, 32), (37, 100), (5, 600)])
@pytest.mark.parametrize("pack", PACKS)
def test_packing_rounds_as_the_definition_does(pack: str, rows: int, depth: int) -> None:
    weight = torch.randn(rows, depth)
    weight[1] = 0
    if pack in NIBBLE_FORMS:
        integers, steps, lows = formats.quantise_int4(weight)
        packed = pack_cpu(pack, weight).packed.panels
        sides = packed[..., 256:].contiguous().view(torch.float16).view(-1, steps.shape[1], 2, 16)
        found = sides.permute(2, 0, 3, 1).flatten(1, 2)[:, :rows]
        assert torch.equal(found[0], steps) and torch.equal(found[1], lows)
        quads = packed[..., :256].view(-1, steps.shape[1], 4, 16, 4).permute(0, 3, 1, 2, 4)
        nibbles = torch.stack([quads % 16, quads // 16], -2).reshape(-1, steps.shape[1] * 32)[:rows]
        assert torch.equal(nibbles, integers)
        return
    ids = torch.randperm(rows).repeat(3)
    expected = pack_reference(pack, weight).rows(ids, 3.0)
    assert torch.allclose(pack_cpu(pack, weight).rows(ids, 3.0), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("pack", PACKS)
def test_what_was_packed_once_makes_the_same_layer_again(pack: str) -> None:
    weight, bias, x = torch.randn(37, 100), torch.randn(37), torch.randn(5, 100)
    layer = pack_cpu(pack, weight, bias)
    assert torch.equal(pack_cpu(pack, layer.packed, bias)(x), layer(x))


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("bias", [False, True])
def test_layers_that_run_as_one_give_what_each_gives(pack: str, bias: bool) -> None:
    """Of the rows of their groups, of which some are empty and some longer than a block."""
    torch.manual_seed(0)
    layers = [pack_cpu(pack, torch.randn(37, 64), torch.randn(37) if bias else None) for _ in range(5)]
    groups = torch.tensor([[0, 0, 1], [3, 1, 120], [4, 121, 7], [0, 0, 0]])
    grouped, expected = cpu.group_linear(layers), reference.group_linear(layers)
    assert isinstance(grouped, cpu.PackedGroup)
    x, gate_up = torch.randn(128, 64), torch.randn(128, 128)
    assert torch.equal(grouped(x, groups), expected(x, groups))
    assert torch.equal(grouped.after_silu_mul(gate_up, groups), expected.after_silu_mul(gate_up, groups))


def test_layers_of_several_formats_run_one_after_the_other() -> None:
    layers = [cpu.pack_linear(torch.randn(16, 32), None, form) for form in (formats.INT8, formats.INT4)]
    groups, x = torch.tensor([[0, 0, 2], [1, 2, 1]]), torch.randn(3, 32)
    assert torch.equal(cpu.group_linear(layers)(x, groups), torch.cat([layers[0](x[:2]), layers[1](x[2:])]))


def test_int4_is_no_worse_than_the_whole_range_in_15_steps() -> None:
    weight = torch.randn(64, 50)
    integers, steps, lows = formats.quantise_int4(weight)
    assert integers.shape == (64, 64)
    assert integers.max() == 15
    rounded = integers.view(64, 2, 32) * steps.float()[..., None] + lows.float()[..., None]
    error = (rounded.flatten(1)[:, :50] - weight).square().sum()
    groups = torch.nn.functional.pad(weight, (0, 14)).view(64, 2, 32)
    plain = (groups.amax(-1) - groups.amin(-1)) / 15
    assert error < (plain.square().sum() * 32 / 12)


@pytest.mark.parametrize("pack", INTEGERS)
def test_rows_of_zeros_give_zeros(pack: str) -> None:
    weight, x = torch.randn(20, 24), torch.randn(7, 24)
    weight[3] = 0
    x[5] = 0
    out = pack_cpu(pack, weight)(x)
    assert (out[:, 3] == 0).all()
    assert (out[5] == 0).all()
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("pack", INTEGERS)
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_gives_nan_and_spares_the_others(broken: float, pack: str) -> None:
    weight, x = torch.randn(33, 600), torch.randn(8, 600)
    layer = pack_cpu(pack, weight)
    expected = layer(x)
    x[2, 590] = broken
    out = layer(x)
    assert out[2].isnan().all()
    assert torch.equal(without(out, 2), without(expected, 2))


def without(rows: Tensor, index: int) -> Tensor:
    return torch.cat([rows[:index], rows[index + 1 :]])


@pytest.mark.parametrize("pack", INTEGERS)
@pytest.mark.parametrize("size", [1e-38, 1e-20, 1e20, 1e36])
def test_rows_of_any_size_are_multiplied(size: float, pack: str) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(16, 64), torch.randn(1, 64)
    expected = pack_reference(pack, weight)(x)
    error = pack_cpu(pack, weight)(x * size) / size - expected
    assert (
        error.norm() <= (TOLERANCE[pack] if size > 1e-29 else 1) * expected.norm()
    )  # next to nothing is nothing


@pytest.mark.parametrize("pack", INTEGERS)
def test_the_largest_sums_fit(pack: str) -> None:
    depth = 2 * cpu.BLOCK_DEPTH
    weight, x = torch.ones(16, depth), torch.ones(1, depth)
    weight[1] = -1
    layer = pack_cpu(pack, weight)
    assert layer(x)[0, :2].tolist() == pytest.approx([depth, -depth], rel=1e-5)
    assert layer(-x)[0, :2].tolist() == pytest.approx([-depth, depth], rel=1e-5)


@pytest.mark.parametrize("pack", PACKS)
def test_bytes_are_those_of_the_padded_weight(pack: str) -> None:
    weight, bias = torch.randn(20, 12), torch.randn(20)
    expected = {"float32": 4 * 32 * 12, "pairs": 32 * 16 + 4 * 32, "quads": 32 * 32 + 4 * 32}
    nibbles = 32 * (16 + 2 * 2)
    assert pack_cpu(pack, weight, bias).nbytes == expected.get(pack, nibbles) + 4 * 20


def test_weights_are_multiplied_as_the_machine_can() -> None:
    weight, x = torch.randn(16, 64), torch.randn(3, 64)
    by_bytes = "quads" if MULTIPLIES_QUADS else "pairs"
    assert torch.equal(cpu.pack_linear(weight, None, formats.INT8)(x), pack_cpu(by_bytes, weight)(x))
    own = next(name for name, form in NIBBLE_FORMS.items() if form == OWN_NIBBLES)
    assert torch.equal(cpu.pack_linear(weight, None, formats.INT4)(x), pack_cpu(own, weight)(x))


def test_formats_that_a_backend_lacks_are_refused() -> None:
    with pytest.raises(ValueError, match="bfloat16; only float32, int8, int4"):
        cpu.pack_linear(torch.randn(16, 16), None, formats.BFLOAT16)


def test_nibbles_give_the_same_on_all_machines() -> None:
    weight, x = torch.randn(48, 100), torch.randn(7, 100)
    outs = [pack_cpu(name, weight)(x) for name in NIBBLE_FORMS if name in INTEGERS]
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.skipif(not FEATURES.get("avx2"), reason="the instruction is x86's")
def test_pairs_are_multiplied_by_one_instruction() -> None:
    @numba.njit("void(int64)")  # not cached: code from the cache cannot be looked at
    def tile(place: int) -> None:
        panel_tile(INT8, 6, 1, place, 8, place, place, place, 8, place, 16, 0)

    machine_code = "".join(tile.inspect_asm().values())
    assert "vpmaddwd" in machine_code or "vpdpwssd" in machine_code
    assert "vpmulld" not in machine_code
