"""PruneNet (arXiv 2501.15296): a policy trained to keep rows that preserve the spectrum of gate_proj."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from curkv.models.blocks import LayerWeights
from curkv.models.pruning.ks import ks_distance, singular_values
from curkv.models.pruning.methods.base import LayerCut, Method, Progress, best_rows
from curkv.models.pruning.plan import PruningError
from curkv.models.pruning.source import Source

POLICY_FILE = "prunenet_policy.json"
"""No safetensors file: some loaders read every one that lies beside the weights."""

# Section 4 of the paper.
EPISODES = 20
LEARNING_RATE = 1e-3
DISCOUNT = 0.99

MAX_LOGIT = 10.0
"""Beyond it a sigmoid in float32 is as good as 0 or 1, and its logarithm and gradient are lost."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Scores the rows of any gate_proj of its shape; one for all layers, ratios and models of that shape.

    The published policy maps W to P = W A^T + b and P to logits P s. Nothing lies between the two maps, so
    that logits = W (A^T s) + b.s: a vector and a number, which is what is stored.

    Attributes:
        direction: float32 [hidden].
        offset: float32 [].
        rows: The intermediate size it was trained for.
    """

    direction: Tensor
    offset: Tensor
    rows: int

    @classmethod
    def collapse(cls, a: Tensor, b: Tensor, s: Tensor) -> Policy:
        """Builds the policy from the published parameters: A [n, d], b [n], s [n]."""
        return cls(a.T @ s, b @ s, len(s))

    def logits(self, gate: Tensor) -> Tensor:
        """Scores gate_proj [n, d]: float32 [n], clamped."""
        return (gate @ self.direction + self.offset).clamp(-MAX_LOGIT, MAX_LOGIT)

    def save(self, path: Path) -> None:
        """Writes the policy."""
        content = {
            "rows": self.rows,
            "offset": float(self.offset),
            "direction": self.direction.tolist(),
        }
        path.write_text(json.dumps(content), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Policy:
        """Reads a policy.

        Raises:
            PruningError: The file is missing or is no policy.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            direction, offset = torch.tensor(content["direction"]), torch.tensor(content["offset"])
            return cls(direction, offset, int(content["rows"]))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise PruningError(f"{path} is no PruneNet policy: {error}") from error


class PruneNet(Method):
    """Keeps the rows that a trained policy scores highest."""

    def __init__(self, seed: int = 0, policy: Path | None = None, episodes: int = EPISODES):
        self._generator = torch.Generator().manual_seed(seed)
        self._reused = policy
        self._policy = Policy.load(policy) if policy else None
        self._episodes = episodes
        self._rewards: list[float] = []

    def prepare(self, source: Source, kept: int, progress: Progress) -> None:
        """Trains the policy, or checks that the given one fits the model."""
        shape = (source.config.intermediate_size, source.config.hidden_size)
        if self._policy is None:
            self._policy = self._train(source, kept, progress)
        elif (self._policy.rows, len(self._policy.direction)) != shape:
            trained = f"{self._policy.rows} x {len(self._policy.direction)}"
            raise PruningError(
                f"the policy is for gate_proj of {trained}, this model's is {shape[0]} x {shape[1]}"
            )

    def cut(self, layer: int, weights: LayerWeights, kept: int) -> LayerCut:
        """Keeps the rows of highest logit: no sampling once the policy is trained."""
        assert self._policy is not None
        gate, _ = weights.mlp.gate_up.chunk(2)
        return LayerCut(best_rows(self._policy.logits(gate), kept))

    def save(self, directory: Path) -> None:
        """Writes the policy for `--policy`."""
        if self._policy is not None and not self._reused:
            self._policy.save(directory / POLICY_FILE)

    def provenance(self) -> dict[str, Any]:
        """Returns where the policy came from, or the mean reward of its top rows after each episode."""
        return {"policy": str(self._reused)} if self._reused else {"rewards": self._rewards}

    def _train(self, source: Source, kept: int, progress: Progress) -> Policy:
        """Runs REINFORCE over whole passes through the layers and returns the best policy seen."""
        parameters = self._initial(source.config.intermediate_size, source.config.hidden_size)
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
        environment = SpectrumEnvironment(source, kept)
        best: tuple[float, Policy] | None = None
        baseline: Tensor | None = None
        for episode in range(self._episodes):
            with torch.no_grad():
                policy = Policy.collapse(*parameters)
                reward = environment.top_reward(policy)
            self._rewards.append(reward)
            if best is None or reward > best[0]:
                best = reward, policy
            log_probabilities, rewards = environment.play(Policy.collapse(*parameters), self._generator)
            returns = discounted(rewards, DISCOUNT)
            baseline = returns if baseline is None else baseline
            optimizer.zero_grad()
            loss = -((returns - baseline) * log_probabilities).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            baseline = baseline + (returns - baseline) / (episode + 1)
            progress("Training the policy", episode + 1, self._episodes)
        assert best is not None
        return best[1]

    def _initial(self, rows: int, hidden: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draws the published parameters A, b and s as torch's Linear does."""
        shapes = (((rows, hidden), hidden), ((rows,), hidden), ((rows,), rows))
        draws = [
            (2 * torch.rand(shape, generator=self._generator) - 1) / fan_in**0.5 for shape, fan_in in shapes
        ]
        a, b, s = (draw.requires_grad_() for draw in draws)
        return a, b, s


class SpectrumEnvironment:
    """Rewards a choice of rows by 1 / KS between the spectra of gate_proj before and after."""

    def __init__(self, source: Source, kept: int):
        self._source, self._kept = source, kept
        self._spectra = [singular_values(self._gate(layer)) for layer in range(source.config.num_layers)]

    def play(self, policy: Policy, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws rows in every layer.

        Returns:
            Log-probability of each layer's draw, differentiable, and its reward: float32 [layers] both.
        """
        log_probabilities, rewards = [], []
        for layer in range(len(self._spectra)):
            gate = self._gate(layer)
            rows, log_probability = draw_rows(policy.logits(gate), self._kept, generator)
            log_probabilities.append(log_probability)
            rewards.append(self._reward(layer, gate[rows]))
        return torch.stack(log_probabilities), torch.tensor(rewards)

    def top_reward(self, policy: Policy) -> float:
        """Returns the mean reward of the rows that pruning would keep."""
        gates = (self._gate(layer) for layer in range(len(self._spectra)))
        rewards = [
            self._reward(layer, gate[best_rows(policy.logits(gate), self._kept)])
            for layer, gate in enumerate(gates)
        ]
        return sum(rewards) / len(rewards)

    def _gate(self, layer: int) -> Tensor:
        return self._source.tensor(f"model.layers.{layer}.mlp.gate_proj.weight").float()

    def _reward(self, layer: int, kept_gate: Tensor) -> float:
        spectrum = self._spectra[layer]
        resolution = 1 / len(spectrum)  # smaller distances are not told apart, and none may be divided by
        return 1 / max(ks_distance(spectrum, singular_values(kept_gate)), resolution)


def draw_rows(logits: Tensor, kept: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws rows one after another without replacement, each with probability proportional to sigmoid(logit).

    Args:
        logits: float32 [n].
        kept: Rows to draw.
        generator: Source of randomness.

    Returns:
        int64 [kept] in the order drawn, and the log-probability of that ordered draw (Plackett-Luce), [].
    """
    log_weights = F.logsigmoid(logits)
    uniform = torch.rand(len(logits), generator=generator).clamp_min(torch.finfo(torch.float32).tiny)
    gumbel = -(-uniform.log()).log()
    order = (log_weights.detach() + gumbel).argsort(descending=True)
    ordered = log_weights[order]
    log_remaining = ordered.flip(0).logcumsumexp(0).flip(0)
    return order[:kept], (ordered - log_remaining)[:kept].sum()


def discounted(rewards: Tensor, discount: float) -> Tensor:
    """Returns the discounted sums of the rewards from each layer on, float32 [layers]."""
    returns = rewards.clone()
    for layer in range(len(rewards) - 2, -1, -1):
        returns[layer] += discount * returns[layer + 1]
    return returns
