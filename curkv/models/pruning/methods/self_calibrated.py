"""Rows chosen by what they do on text that the model wrote itself: calibration without outside data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from curkv.models.blocks import LayerWeights
from curkv.models.pruning.distil import distil, trained_tensors
from curkv.models.pruning.forward import LayerForward, Model
from curkv.models.pruning.methods.base import DOWN, LayerCut, Method, Progress, best_rows
from curkv.models.pruning.second_order import refit, surgeon
from curkv.models.pruning.self_text import TEXT_FILE, Writing, load_text, save_text, write_text
from curkv.models.pruning.source import Source

BATCH = 4
"""Sequences that go through a layer at once."""
HELD_BYTES = 1 << 30
"""Weight files up to this size are read once for writing text, larger ones for each token."""
SCORE_DAMPING = 1e-2
"""What is added to the second moments by which rows are chosen, as a share of their mean."""

DAMPINGS = (0.1, 0.3, 1.0, 3.0, 10.0)
"""The dampings that are tried for the refit that aims at the dense model's residual stream."""

HELD_OUT = 0.2
"""Share of the sequences on which the damping is chosen; the others decide about the rest."""


class SelfCalibrated(Method):
    """Scores a row by rms(activation) x norm(down column), or removes and compensates (`compensate`).

    With `compensate`, layers are treated in order, each reading what the pruned layers before it produce.
    `surgeon` gives the rows and weights that best reproduce the layer's own output on that; from there the
    weights move towards the residual stream of the dense model, as far as this helps on text held out, so
    that later layers correct the errors of earlier ones.

    An error counts relative to the residual stream it is added to, because that is normalised before it is
    read again; else the few tokens with massive activations (arXiv 2402.17762) would decide alone.
    """

    def __init__(
        self,
        seed: int = 0,
        compensate: bool = True,
        text: Path | None = None,
        writing: Writing = Writing(),  # noqa: B008
        distil_steps: int = 0,
    ):
        self._seed = seed
        self._compensate = compensate
        self._reused = text
        self._writing = writing
        self._distil_steps = distil_steps
        self._distilled: list[LayerCut] = []
        self._losses: list[float] = []
        self._dampings: list[float] = []
        self._errors: list[float] = []

    def prepare(self, source: Source, kept: int, progress: Progress) -> None:
        """Writes the text, or reads that of an earlier run, and embeds it."""
        self._text = self._read_or_write(source, progress)
        self._forward = LayerForward(source.config, self._text.shape[1])
        embedding = source.tensor("model.embed_tokens.weight")
        held_out = max(1, round(HELD_OUT * len(self._text)))
        parts = torch.split(self._text, [len(self._text) - held_out, held_out])
        seen, unseen = (torch.split(part, BATCH) for part in parts)
        self._calibrating = len(seen)
        self._dense = [embedding[batch].float() for batch in (*seen, *unseen)]
        self._pruned = list(self._dense)
        if self._distil_steps:
            self._distilled = self._distil(source, kept, progress)

    def _read_or_write(self, source: Source, progress: Progress) -> Tensor:
        if self._reused:
            return load_text(self._reused, source.config.vocab_size)
        model = Model.mapped(source.checkpoint)
        if source.bytes <= HELD_BYTES:
            model.layers = list(model.layers)
        return write_text(
            model, self._writing, self._seed, lambda done, total: progress("Writing text", done, total)
        )

    @torch.inference_mode()
    def cut(self, layer: int, weights: LayerWeights, kept: int) -> LayerCut:
        """Runs the text through the layer and decides on what it sees."""
        if self._distilled:
            return self._distilled[layer]
        return self._compensated(weights, kept) if self._compensate else self._scored(weights, kept)

    def save(self, directory: Path) -> None:
        """Writes the text for `--text`."""
        if not self._reused:
            save_text(self._text, directory / TEXT_FILE)

    def provenance(self) -> dict[str, Any]:
        """Returns the text's size and what the refit of each layer cost."""
        text = {"text": str(self._reused)} if self._reused else {"writing": asdict(self._writing)}
        compensation = {"dampings": self._dampings, "output_errors": self._errors} if self._compensate else {}
        distillation = {"distil_steps": self._distil_steps, "losses": self._losses}
        return {
            **text,
            "compensate": self._compensate,
            **compensation,
            **(distillation if self._distil_steps else {}),
        }

    def _distil(self, source: Source, kept: int, progress: Progress) -> list[LayerCut]:
        """Decides about all layers, trains what is left of them together and returns that."""
        cuts, left = [], []
        for layer in range(source.config.num_layers):
            weights = source.checkpoint.layer(layer)
            cuts.append(self.cut(layer, weights, kept))
            left.append(cuts[-1].apply(weights))
            progress("Choosing rows", layer + 1, source.config.num_layers)
        checkpoint = source.checkpoint
        model = Model(source.config, checkpoint.embedding, left, checkpoint.final_norm, checkpoint.head)
        dense = [states for batch in self._dense for states in batch]
        self._losses = distil(
            model,
            self._text,
            dense,
            self._distil_steps,
            self._seed,
            lambda done, total: progress("Distilling", done, total),
        )
        return [
            LayerCut(cut.rows, trained_tensors(weights, source.config))
            for cut, weights in zip(cuts, model.layers, strict=True)
        ]

    def _scored(self, weights: LayerWeights, kept: int) -> LayerCut:
        energy = torch.zeros(weights.mlp.down.shape[1])
        for index, x in enumerate(self._dense):
            after = self._forward.attention(x, weights)
            hidden = self._forward.activations(after, weights)
            self._dense[index] = after + F.linear(hidden, weights.mlp.down, weights.mlp.down_bias)
            energy += hidden.square().sum((0, 1))
        return LayerCut(best_rows(energy.sqrt() * weights.mlp.down.norm(dim=0), kept))

    def _compensated(self, weights: LayerWeights, kept: int) -> LayerCut:
        hidden_size, rows = weights.mlp.down.shape
        seen, held_out = Moments.zeros(rows, hidden_size), Moments.zeros(rows, hidden_size)
        for index, (dense, pruned) in enumerate(zip(self._dense, self._pruned, strict=True)):
            self._dense[index] = self._forward(dense, weights)
            after = self._forward.attention(pruned, weights)
            hidden = self._forward.activations(after, weights)
            wanted = self._dense[index] - after
            if weights.mlp.down_bias is not None:
                wanted = wanted - weights.mlp.down_bias
            weight = self._dense[index].square().mean(-1, keepdim=True).rsqrt()
            (seen if index < self._calibrating else held_out).add(weight * hidden, weight * wanted)
            self._pruned[index] = after
        best = self._choose(seen, held_out, weights.mlp.down, kept)
        cut = best.apply(weights)  # its activations are computed again: kept for all texts, they are large
        for index, after in enumerate(self._pruned):
            hidden = self._forward.activations(after, cut)
            self._pruned[index] = after + F.linear(hidden, cut.mlp.down, cut.mlp.down_bias)
        return best

    def _choose(self, seen: Moments, held_out: Moments, down: Tensor, kept: int) -> LayerCut:
        rows, compensated = surgeon(seen.gram, down, kept, SCORE_DAMPING)
        part, held_part = seen.of(rows), held_out.of(rows)
        candidates = [refit(part.gram, part.cross, compensated, damping) for damping in DAMPINGS]
        errors = [held_part.error(candidate) for candidate in candidates]
        best = min(range(len(errors)), key=errors.__getitem__)
        self._dampings.append(DAMPINGS[best])
        self._errors.append(errors[best])
        return LayerCut(rows, {DOWN: candidates[best]})


@dataclass(slots=True)
class Moments:
    """What least squares has to know of activations H [tokens, n] and wanted outputs Y [tokens, hidden].

    Attributes:
        gram: [n, n], H^T H.
        cross: [n, hidden], H^T Y.
        energy: Sum of the squares of Y.
    """

    gram: Tensor
    cross: Tensor
    energy: float

    @classmethod
    def zeros(cls, rows: int, hidden: int) -> Moments:
        """Returns the moments of no tokens."""
        return cls(torch.zeros(rows, rows), torch.zeros(rows, hidden), 0.0)

    def add(self, activations: Tensor, wanted: Tensor) -> None:
        """Accumulates [B, T, n] and [B, T, hidden]."""
        h, y = activations.flatten(0, 1), wanted.flatten(0, 1)
        self.gram.addmm_(h.T, h)
        self.cross.addmm_(h.T, y)
        self.energy += float(y.double().square().sum())

    def of(self, rows: Tensor) -> Moments:
        """Returns the moments of some rows."""
        return Moments(self.gram[rows][:, rows], self.cross[rows], self.energy)

    def error(self, down: Tensor) -> float:
        """Returns the squared error of the output as a share of its energy."""
        d = down.double()
        fitted = (d @ self.gram.double() * d).sum() - 2 * (d.T * self.cross.double()).sum()
        return float(fitted) / self.energy + 1
