import pytest
import torch

from curkv.kernels.rms_norm import cpu, reference

SHAPES = [(0, 64), (1, 1), (1, 576), (3, 7), (5, 65), (9, 128), (37, 100), (130, 1031)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_matches_reference(shape: tuple[int, int], with_residual: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape) * 3, torch.randn(shape[1])
    residual = torch.randn(shape) if with_residual else None
    before = x.clone()
    actual = cpu.rms_norm(x, weight, 1e-5, residual)
    torch.testing.assert_close(actual, reference.rms_norm(x, weight, 1e-5, residual), rtol=2e-6, atol=1e-6)
    assert torch.equal(x, before)


def test_scale_of_tiny_rows_is_bounded_by_eps() -> None:
    out = cpu.rms_norm(torch.full((1, 8), 1e-20), torch.ones(8), 1e-6)
    torch.testing.assert_close(out, torch.full((1, 8), 1e-17))


def test_nan_stays_in_its_row() -> None:
    x = torch.ones(2, 64)
    x[0, 3] = float("nan")
    out = cpu.rms_norm(x, torch.ones(64), 1e-6)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


def test_reference_normalises_in_float32() -> None:
    x = torch.full((1, 64), 300.0, dtype=torch.float16)
    out = reference.rms_norm(x, torch.ones(64, dtype=torch.float16), 1e-6)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out, torch.ones(1, 64, dtype=torch.float16))
