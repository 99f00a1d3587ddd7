import math
from itertools import permutations
from pathlib import Path

import pytest
import torch

from curkv.models.pruning.ks import ks_distance, singular_values
from curkv.models.pruning.methods.prunenet import (
    POLICY_FILE,
    Policy,
    PruneNet,
    SpectrumEnvironment,
    discounted,
    draw_rows,
)
from curkv.models.pruning.plan import PruningError
from curkv.models.pruning.source import Source
from tests.pruning.conftest import ignore_progress


def published_logits(w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """Section 4 of the paper: P = W A^T + b, logit = P s."""
    return (w @ a.T + b) @ s


def test_the_stored_policy_computes_the_published_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    w, a = torch.randn(24, 8, generator=generator), torch.randn(24, 8, generator=generator)
    b, s = torch.randn(24, generator=generator), torch.randn(24, generator=generator) / 10
    torch.testing.assert_close(
        Policy.collapse(a, b, s).logits(w), published_logits(w, a, b, s).clamp(-10, 10)
    )


def test_log_probability_is_that_of_the_draw() -> None:
    """Against the product of the conditional probabilities, and over all draws they sum to one."""
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0])
    weights = logits.sigmoid().tolist()

    def probability(order: tuple[int, ...]) -> float:
        left, product = sum(weights), 1.0
        for row in order:
            product *= weights[row] / left
            left -= weights[row]
        return product

    assert math.isclose(sum(probability(order) for order in permutations(range(4), 2)), 1, rel_tol=1e-6)
    counts: dict[tuple[int, ...], int] = {}
    generator = torch.Generator().manual_seed(0)
    for _ in range(4000):
        rows, log_probability = draw_rows(logits, 2, generator)
        order = tuple(rows.tolist())
        counts[order] = counts.get(order, 0) + 1
        assert math.isclose(log_probability.exp().item(), probability(order), rel_tol=1e-4)
    for order in permutations(range(4), 2):
        assert abs(counts[order] / 4000 - probability(order)) < 0.03


def test_gradient_is_finite_at_extreme_logits() -> None:
    direction = torch.full((4,), 1e4, requires_grad=True)
    logits = Policy(direction, torch.tensor(0.0), 6).logits(torch.randn(6, 4))
    draw_rows(logits, 3, torch.Generator().manual_seed(0))[1].backward()
    assert direction.grad is not None and direction.grad.isfinite().all()


def test_rewards_to_go_are_discounted() -> None:
    torch.testing.assert_close(discounted(torch.tensor([1.0, 2.0, 4.0]), 0.5), torch.tensor([3.0, 4.0, 4.0]))


def test_ks_distance() -> None:
    low, high = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([5.0, 6.0])
    assert ks_distance(low, low) == 0
    assert ks_distance(low, high) == 1
    assert ks_distance(low, torch.tensor([2.5, 9.0])) == 0.5
    values = singular_values(torch.randn(6, 4, dtype=torch.bfloat16))
    assert values.dtype == torch.float32 and (values.diff() >= 0).all()


def test_the_best_policy_is_kept_and_reused_for_other_ratios(base: Source, tmp_path: Path) -> None:
    method = PruneNet(seed=1, episodes=6)
    method.prepare(base, 48, ignore_progress)
    rewards = method.provenance()["rewards"]
    assert method._policy is not None
    kept_reward = SpectrumEnvironment(base, 48).top_reward(method._policy)
    assert len(rewards) == 6 and math.isclose(kept_reward, max(rewards), rel_tol=1e-5)

    method.save(tmp_path)
    reused = PruneNet(policy=tmp_path / POLICY_FILE)
    reused.prepare(base, 32, ignore_progress)
    weights = base.checkpoint.layer(0)
    fewer, more = reused.cut(0, weights, 32).rows, method.cut(0, weights, 48).rows
    assert set(fewer.tolist()) < set(more.tolist())


def test_training_finds_rows_that_keep_the_spectrum(base: Source) -> None:
    """The best of its deterministic choices beats the average random one."""
    method = PruneNet(seed=0, episodes=20)
    method.prepare(base, 32, ignore_progress)
    environment = SpectrumEnvironment(base, 32)
    random = [environment.top_reward(Policy(torch.randn(32), torch.tensor(0.0), 64)) for _ in range(20)]
    assert max(method.provenance()["rewards"]) > sum(random) / len(random)


def test_policy_of_another_shape_is_refused(base: Source, tmp_path: Path) -> None:
    Policy(torch.zeros(8), torch.tensor(0.0), 24).save(tmp_path / POLICY_FILE)
    with pytest.raises(PruningError, match="24 x 8"):
        PruneNet(policy=tmp_path / POLICY_FILE).prepare(base, 48, ignore_progress)
    with pytest.raises(PruningError, match="no PruneNet policy"):
        PruneNet(policy=tmp_path / "missing")
