"""Products of 8 bits on a GPU: torch multiplies on a CPU what it multiplies there."""

from __future__ import annotations

import pytest
import torch

from curkv.kernels.linear import reference
from curkv.kernels.linear.formats import BFLOAT16, FP8, GPU_INT8
from curkv.kernels.linear.triton import RoundedLinear, pack_linear, round_rows
from curkv.kernels.rms_norm.triton import rms_norm
from curkv.kernels.silu_mul.triton import silu_mul

FORMS = pytest.mark.parametrize("form", [FP8, GPU_INT8], ids=lambda form: form.name)
LOST = {"fp8": 0.05, "int8": 0.02}
"""Relative RMS of what rounding x takes: half of a step, evenly spread over steps and channels."""


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16()


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


@FORMS
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_the_product_is_that_of_the_rounded_rows(form, tokens, bias):
    weight, x, offset = draw(48, 96), draw(tokens, 96), draw(48) if bias else None
    layer = pack_linear(weight, offset, form)
    assert isinstance(layer, RoundedLinear)
    rounded, scales, _ = round_rows(x, layer.weight.dtype)
    exact = (rounded.float() * scales[:, None]) @ (layer.weight.float() * layer.scales[:, None]).T
    expected = exact if offset is None else exact + offset.float()
    assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x), expected.bfloat16(), rtol=2**-7, atol=2**-7)
    if tokens:
        assert error(layer(x), reference.pack_linear(weight, offset, form)(x)) < LOST[form.name]


@FORMS
def test_what_goes_before_is_rounded_as_it_is_alone(form):
    layer = pack_linear(draw(32, 80), None, form)
    x, residual, norm, gate_up = draw(5, 80), draw(5, 80), draw(80), draw(5, 160)
    out, total = layer.after_rms_norm(x, norm, 1e-5, residual)
    normed, expected_total = rms_norm(x, norm, 1e-5, residual)
    assert torch.equal(total, expected_total)
    assert torch.equal(out, layer(normed))
    out, total = layer.after_rms_norm(x, norm, 1e-5)
    assert total is x
    assert torch.equal(out, layer(rms_norm(x, norm, 1e-5)))
    assert torch.equal(layer.after_silu_mul(gate_up), layer(silu_mul(gate_up)))


@FORMS
def test_rows_are_rounded_by_their_largest_and_zeros_stay_zeros(form):
    x = draw(4, 64) * torch.tensor([1e-3, 1.0, 1e4, 0.0])[:, None].bfloat16()
    expected, expected_scales = form.encode(x.float())
    rounded, scales, _ = round_rows(x, expected.dtype)
    torch.testing.assert_close(scales, expected_scales)
    assert torch.equal(rounded[3].float(), torch.zeros(64))
    for row in range(3):  # a number between two values of 8 bits may fall to either side
        lost = error(expected[row].float() * expected_scales[row], x[row])
        assert error(rounded[row].float() * scales[row], x[row]) <= 1.001 * lost


@FORMS
def test_a_weight_holds_a_byte_a_number_and_is_told_as_what_it_was_rounded_to(form):
    weight = draw(48, 96)
    layer = pack_linear(weight, None, form)
    assert layer.nbytes == 48 * 96 + 48 * 4
    assert error(layer.given, weight) < LOST[form.name]


def test_weights_of_odd_sizes_and_those_of_the_head_are_not_rounded():
    assert FP8.of(draw(48, 90)) is BFLOAT16 and FP8.of(draw(48, 96)) is FP8
    x, head = 30 * draw(3, 64), pack_linear(draw(40, 64), None, FP8.of_head)
    assert head(x).dtype == torch.float32
    torch.testing.assert_close(head(x), x.float() @ head.weight.float().T)
