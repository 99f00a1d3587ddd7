"""The packed CPU linear layer gives what torch gives."""

import pytest
import torch

from curkv.kernels.linear import cpu, reference


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "depth"), [(16, 8), (1, 1), (37, 577), (960, 576), (192, 1536)])
@pytest.mark.parametrize("tokens", [1, 2, 5, 6, 7, 8, 97, 200])
def test_agrees_with_torch(tokens: int, rows: int, depth: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(tokens + rows)
    weight = torch.randn(rows, depth, generator=generator)
    offset = torch.randn(rows, generator=generator) if bias else None
    x = torch.randn(tokens, depth, generator=generator)
    expected = reference.pack_linear(weight, offset)(x)
    actual = cpu.pack_linear(weight, offset)(x)
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= 1e-5 * expected.norm()


def test_a_row_does_not_depend_on_the_batch_it_is_in() -> None:
    weight, x = torch.randn(64, 100), torch.randn(50, 100)
    layer = cpu.pack_linear(weight)
    alone = torch.cat([layer(row[None]) for row in x])
    assert torch.equal(layer(x), alone)
