"""Experts are chosen and their tokens sorted as torch does it."""

import pytest
import torch

from curkv.kernels.route import cpu, reference


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(("count", "experts", "chosen"), [(1, 1, 1), (1, 8, 2), (5, 4, 4), (70, 128, 8)])
def test_agrees_with_torch(count: int, experts: int, chosen: int, normalised: bool) -> None:
    torch.manual_seed(0)
    logits = 5 * torch.randn(count, experts)
    found, expected = (module.route(logits, chosen, normalised) for module in (cpu, reference))
    torch.testing.assert_close(found.shares, expected.shares)
    for name in ("tokens", "places", "groups"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -float("inf")])
def test_rows_of_equal_or_no_numbers_are_sent_somewhere(value: float) -> None:
    """And leave other rows alone."""
    logits = torch.tensor([[value] * 5, [1.0, 2.0, 3.0, 4.0, 5.0]])
    routes = cpu.route(logits, 2, True)
    assert sorted(routes.places.flatten().tolist()) == [0, 1, 2, 3]
    assert routes.groups[:, 2].sum() == 4 and routes.groups[:, 0].max() < 5
    assert torch.equal(routes.shares[1], torch.tensor([5.0, 4.0]).softmax(0))
