import pytest
import torch

from curkv.kernels.gelu_mul import cpu, reference

SHAPES = [(0, 8), (1, 1), (1, 1536), (3, 7), (33, 1000)]


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(shape[0], 2 * shape[1]) * 4
    exact = reference.gelu_mul(gate_up.double())  # in float32 torch's loses digits of small results
    torch.testing.assert_close(cpu.gelu_mul(gate_up).double(), exact, rtol=1e-5, atol=1e-7)


def test_extremes() -> None:
    gate = torch.tensor([-1e30, -1000.0, 0.0, 1000.0, 3e38, float("inf"), float("nan")])
    out = cpu.gelu_mul(torch.cat([gate, torch.ones_like(gate)])[None])[0]
    torch.testing.assert_close(out[1:5], torch.tensor([0.0, 0.0, 1000.0, 3e38]))
    assert abs(float(out[0])) < 1e-7
    assert out[5].isinf()
    assert out[6].isnan()
