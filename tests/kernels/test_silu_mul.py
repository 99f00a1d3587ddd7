import pytest
import torch

from curkv.kernels.silu_mul import cpu, reference

SHAPES = [(0, 8), (1, 1), (1, 1536), (3, 7), (5, 65), (33, 1000)]


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(shape[0], 2 * shape[1]) * 4
    torch.testing.assert_close(cpu.silu_mul(gate_up), reference.silu_mul(gate_up), rtol=2e-6, atol=1e-7)


def test_relative_error_over_the_whole_range() -> None:
    gate = torch.linspace(-86, 100, 500_001)
    actual = cpu.silu_mul(torch.cat([gate, torch.ones_like(gate)])[None])[0].double()
    exact = torch.nn.functional.silu(gate.double())
    assert ((actual - exact).abs() <= 5e-7 * exact.abs()).all()


def test_extremes() -> None:
    gate = torch.tensor([-1e30, -1000.0, 0.0, 1000.0, 3e38, float("inf"), float("nan")])
    out = cpu.silu_mul(torch.cat([gate, torch.ones_like(gate)])[None])[0]
    torch.testing.assert_close(out[1:5], torch.tensor([0.0, 0.0, 1000.0, 3e38]))
    assert abs(float(out[0])) < 1e-7
    assert out[5].isinf()
    assert out[6].isnan()
