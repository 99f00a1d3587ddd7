import torch

from curkv.models.pruning.methods.self_calibrated import Moments
from curkv.models.pruning.second_order import refit, surgeon


def output_error(activations: torch.Tensor, down: torch.Tensor, rows: torch.Tensor) -> float:
    """Squared error of the outputs after the best least-squares fit of the rows that stay."""
    wanted = activations @ down.T
    fit = torch.linalg.lstsq(activations[:, rows], wanted).solution
    return (activations[:, rows] @ fit - wanted).square().sum().item()


def test_the_first_row_removed_is_the_cheapest_after_refitting() -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(200, 10, generator=generator, dtype=torch.float64)
    h[:, 3] = h[:, 4] + h[:, 5] + 0.05 * h[:, 3]
    down = torch.randn(6, 10, generator=generator, dtype=torch.float64)
    rows, _ = surgeon(h.T @ h, down, 9, damping=1e-9)
    every = torch.arange(10)
    cheapest = min(range(10), key=lambda row: output_error(h, down, every[every != row]))
    assert rows.tolist() == [row for row in range(10) if row != cheapest]


def test_rows_that_others_can_replace_go_and_nothing_is_lost() -> None:
    generator = torch.Generator().manual_seed(1)
    independent = torch.randn(300, 12, generator=generator)
    h = torch.cat([independent, independent @ torch.randn(12, 6, generator=generator)], dim=1)
    down = torch.randn(5, 18, generator=generator)
    gram = h.T @ h
    rows, new = surgeon(gram, down, 12, damping=1e-6)
    torch.testing.assert_close(h[:, rows] @ new.T, h @ down.T, rtol=1e-2, atol=1e-2)


def test_refit_without_damping_is_least_squares_and_with_much_keeps_the_weights() -> None:
    generator = torch.Generator().manual_seed(2)
    h = torch.randn(100, 8, generator=generator, dtype=torch.float64)
    wanted = torch.randn(100, 3, generator=generator, dtype=torch.float64)
    down = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    gram, cross = h.T @ h, h.T @ wanted
    solution = torch.linalg.lstsq(h, wanted).solution.T.float()
    torch.testing.assert_close(refit(gram, cross, down, 0.0), solution)
    torch.testing.assert_close(refit(gram, cross, down, 1e9), down.float())


def test_moments_give_the_error_of_any_weights() -> None:
    h, y, down = torch.randn(2, 30, 6), torch.randn(2, 30, 4), torch.randn(4, 3)
    moments = Moments.zeros(6, 4)
    moments.add(h, y)
    rows = torch.tensor([0, 2, 5])
    expected = (h[..., rows] @ down.T - y).square().sum() / y.square().sum()
    assert abs(moments.of(rows).error(down) - expected.item()) < 1e-4
