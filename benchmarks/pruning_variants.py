"""What could go instead of as many rows of every MLP: other counts by layer, attention heads, whole layers.

    python benchmarks/pruning_variants.py instead PRUNED
    python benchmarks/pruning_variants.py distil PRUNED

PRUNED is what `curkv prune --method self-calibrated` made of the default model; the text beside it is used.
`instead`: all variants see the same 32 texts and remove about as many parameters as `--ratio 0.25`; each is
measured before and after the same distillation. `distil` trains PRUNED on all its text. Nothing is written.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from torch.nn import functional as F

from curkv.bench.script import script
from curkv.evaluation.corpora import load_corpus
from curkv.evaluation.perplexity import perplexity, token_windows
from curkv.models.blocks import LayerWeights
from curkv.models.loading import load_tokenizer, resolve_model
from curkv.models.loading.built_in import DEFAULT_MODEL
from curkv.models.pruning.distil import distil as distil_layers
from curkv.models.pruning.forward import LayerForward, Model, fast_products
from curkv.models.pruning.methods.base import DOWN, LayerCut
from curkv.models.pruning.methods.self_calibrated import SCORE_DAMPING, SelfCalibrated
from curkv.models.pruning.second_order import refit, surgeon
from curkv.models.pruning.self_text import TEXT_FILE, load_text, save_text
from curkv.models.pruning.source import Source
from curkv.tables import line

RATIO = 0.25
CALIBRATION, DISTILLATION, PROBE = 32, 128, 2
"""Texts that rows are chosen on, that the distillation sees, that candidates are compared on (the last)."""
STEP, LEAST = 64, 256
"""Rows are given to layers in steps, down to the least that one keeps."""
GROUPS = 9
"""KV groups removed: a tenth of the default model's."""
CORPORA = ("mansfield-park", "documentation")
WINDOW_TOKENS, WINDOWS = 512, 4

Layers = list[LayerWeights]


@dataclass(frozen=True)
class Seen:
    """What the dense model's layers do on its text, each token weighted by 1 / rms of the residual stream.

    Attributes:
        attended: By layer, [q_size, q_size], second moments of what the output projection reads.
        activated: By layer, [intermediate, intermediate], of what the down projection reads.
    """

    attended: list[Tensor]
    activated: list[Tensor]


class Study:
    """The dense model and its text."""

    def __init__(self, pruned: Path):
        self.source = Source(resolve_model(DEFAULT_MODEL))
        self.config = self.source.config
        self.layers: Layers = list(Model.mapped(self.source.checkpoint).layers)
        self.text = load_text(pruned / TEXT_FILE, self.config.vocab_size)
        self.probe = self.text[-PROBE:]
        self._wanted = self._predict(self.layers)
        tokenizer = load_tokenizer(self.source.directory)
        self._windows = [
            token_windows(tokenizer, load_corpus(name), WINDOW_TOKENS, WINDOWS) for name in CORPORA
        ]

    def model(self, layers: Layers) -> Model:
        """Returns a model with other layers."""
        weights = self.source.checkpoint
        return Model(self.config, weights.embedding, layers, weights.final_norm, weights.head)

    def calibrated(self, layers: Layers, kept: Sequence[int]) -> Layers:
        """Prunes the MLPs by `self-calibrated`, to a number of rows of their own."""
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / TEXT_FILE
            save_text(self.text[:CALIBRATION], path)
            method = SelfCalibrated(text=path)
            method.prepare(self.source, 0, lambda *_: None)
        return [
            method.cut(index, weights, rows).apply(weights)
            for index, (weights, rows) in enumerate(zip(layers, kept, strict=True))
        ]

    def distilled(self, layers: Layers, texts: int, steps: int) -> Layers:
        """Trains what is left on the first texts."""
        model, dense = self.model(layers), self.model(self.layers)
        with torch.no_grad(), fast_products():
            wanted = [states for part in torch.split(self.text[:texts], 8) for states in dense.hidden(part)]
        distil_layers(model, self.text[:texts], wanted, steps, seed=0)
        return list(model.layers)

    def perplexities(self, layers: Layers) -> list[float]:
        """Measures a model on each held-out text."""
        model = self.model(layers)
        return [perplexity(lambda ids: model.logits(ids[None])[0], found) for found in self._windows]

    def loss(self, layers: Layers) -> float:
        """Mean KL(dense || layers) of the next token on texts that nothing else sees, in nats."""
        found = self._predict(layers)
        return float(F.kl_div(found, self._wanted, reduction="batchmean", log_target=True))

    @torch.inference_mode()
    def _predict(self, layers: Layers) -> Tensor:
        with fast_products():
            return self.model(layers).logits(self.probe).log_softmax(-1).flatten(0, 1)

    @torch.inference_mode()
    def seen(self) -> Seen:
        """Runs the dense model."""
        forward = LayerForward(self.config, self.text.shape[1])
        states = [self.source.checkpoint.embedding[part] for part in torch.split(self.text[:CALIBRATION], 4)]
        plain, result = torch.eye(self.config.q_size), Seen([], [])
        for weights in self.layers:
            attended = torch.zeros_like(plain)
            activated = torch.zeros(weights.mlp.down.shape[1], weights.mlp.down.shape[1])
            for index, x in enumerate(states):
                heads = forward.attention(x, with_output(weights, plain)) - x
                after = x + F.linear(heads, weights.attention.o)
                hidden = forward.activations(after, weights)
                states[index] = after + F.linear(hidden, weights.mlp.down)
                weight = states[index].square().mean(-1, keepdim=True).rsqrt()
                _add(attended, weight * heads)
                _add(activated, weight * hidden)
            result.attended.append(attended)
            result.activated.append(activated)
        return result


def with_output(weights: LayerWeights, o: Tensor) -> LayerWeights:
    """Returns the layer with another output projection."""
    return replace(weights, attention=replace(weights.attention, o=o))


def _add(gram: Tensor, values: Tensor) -> None:
    rows = values.flatten(0, 1)
    gram.addmm_(rows.T, rows)


def by_loss(study: Study, seen: Seen, weighted: bool) -> list[int]:
    """Gives the rows that each layer keeps: a step goes where it adds least to the output's relative error.

    `weighted` multiplies a layer's squared errors by what they do to the next token: the KL of the model in
    which this layer alone is pruned, per error.
    """
    rows, asked = study.config.intermediate_size, round(RATIO * study.config.intermediate_size)
    curves = []
    for index, (weights, gram) in enumerate(zip(study.layers, seen.activated, strict=True)):
        curve, cut = _loss_curve(gram, weights.mlp.down, rows - asked)
        if weighted:
            alone = [*study.layers[:index], cut.apply(weights), *study.layers[index + 1 :]]
            effect = study.loss(alone) / curve[asked // STEP]
            curve = [effect * loss for loss in curve]
        curves.append(curve)
    steps = [0] * len(curves)
    for _ in range(len(curves) * asked // STEP):
        costs = [
            curve[step + 1] - curve[step] if step + 1 < len(curve) else float("inf")
            for curve, step in zip(curves, steps, strict=True)
        ]
        steps[costs.index(min(costs))] += 1
    return [rows - STEP * step for step in steps]


def _loss_curve(gram: Tensor, down: Tensor, kept: int) -> tuple[list[float], LayerCut]:
    """Squared error after every step of rows that `surgeon` removes, and the layer with `kept` rows."""
    rows, reached, losses = torch.arange(len(gram)), down, [0.0]
    for left in range(len(gram) - STEP, LEAST - 1, -STEP):
        part = gram[rows][:, rows]
        chosen, compensated = surgeon(part, reached, left, SCORE_DAMPING)
        lost = reached.clone()
        lost[:, chosen] -= compensated
        losses.append(losses[-1] + float((lost @ part * lost).sum()))
        rows, reached = rows[chosen], compensated
        if left == kept:
            cut = LayerCut(rows, {DOWN: reached})
    return losses, cut


def without_groups(study: Study, seen: Seen) -> Layers:
    """Removes the KV groups that the next token alone depends on least; a layer's others make up for them."""
    config = study.config
    width = config.q_size // config.num_kv_heads
    losses = {}
    for index, weights in enumerate(study.layers):
        for group in range(config.num_kv_heads):
            o = weights.attention.o.clone()
            o[:, group * width : (group + 1) * width] = 0
            changed = [*study.layers[:index], with_output(weights, o), *study.layers[index + 1 :]]
            losses[index, group] = study.loss(changed)
    layers = list(study.layers)
    chosen = sorted(losses, key=losses.__getitem__)[:GROUPS]
    for index in {index for index, _ in chosen}:
        left = [group for group in range(config.num_kv_heads) if (index, group) not in chosen]
        columns = torch.tensor([group * width + i for group in left for i in range(width)], dtype=torch.int64)
        o = layers[index].attention.o
        layers[index] = with_output(layers[index], _refitted(seen.attended[index], o, columns))
    print(f"KV groups removed, as (layer, group): {sorted(chosen)}", flush=True)
    return layers


def _refitted(gram: Tensor, o: Tensor, columns: Tensor) -> Tensor:
    """Zeroes all but some columns of an output projection and lets those reproduce its output."""
    result = torch.zeros_like(o)
    if len(columns):
        part = gram[columns]
        result[:, columns] = refit(part[:, columns], part @ o.T, o[:, columns], SCORE_DAMPING)
    return result


def without_layers(study: Study, count: int) -> Layers:
    """Removes whole layers, each time the one that the next token depends on least."""
    left = dict(enumerate(study.layers))
    for _ in range(count):
        losses = {
            index: study.loss([weights for other, weights in left.items() if other != index])
            for index in left
        }
        del left[min(losses, key=losses.__getitem__)]
    print(f"layers removed: {sorted(set(range(len(study.layers))) - set(left))}", flush=True)
    return list(left.values())


def variants(study: Study) -> Iterator[tuple[str, float, Callable[[], Layers]]]:
    """Gives each variant's name, millions of parameters removed, and how to make it."""
    config, count = study.config, study.config.num_layers
    rows = config.intermediate_size
    asked = round(RATIO * rows)
    row = 3 * config.hidden_size
    group = 2 * config.hidden_size * (config.q_size // config.num_kv_heads + config.head_dim)
    layer = row * rows + config.num_kv_heads * group
    budget = count * asked * row
    seen = study.seen()

    def uniform() -> Layers:
        return study.calibrated(study.layers, [rows - asked] * count)

    def chosen(weighted: bool) -> Layers:
        kept = by_loss(study, seen, weighted)
        print(f"rows kept by layer: {kept}", flush=True)
        return study.calibrated(study.layers, kept)

    yield "the same rows in every layer", budget, uniform
    yield "rows by layer, by relative error", budget, lambda: chosen(False)
    yield "rows by layer, by error x effect on the next token", budget, lambda: chosen(True)
    left = (budget - GROUPS * group) // (count * row)
    yield (
        f"{GROUPS} KV groups, the rest rows",
        GROUPS * group + count * left * row,
        lambda: study.calibrated(without_groups(study, seen), [rows - left] * count),
    )
    fewer = budget // layer
    yield f"{fewer} whole layers", fewer * layer, lambda: without_layers(study, fewer)


def instead(
    pruned: Path,
    distil_steps: Annotated[int, typer.Option(help="Of the second measurement; 0 leaves it out.")] = 24,
) -> None:
    """Measure every variant: perplexity / base on both texts, before and after the distillation."""
    study = Study(pruned)
    dense = study.perplexities(study.layers)
    for name, removed, make in variants(study):
        layers = make()
        _print([name, f"{removed / 1e6:.1f} M"], study.perplexities(layers), dense)
        if distil_steps:
            trained = study.distilled(layers, DISTILLATION, distil_steps)
            _print(
                [f"{name}, {distil_steps} steps", f"{removed / 1e6:.1f} M"],
                study.perplexities(trained),
                dense,
            )


def distil(pruned: Path, steps: int = 64) -> None:
    """Train a pruned model as `--distil-steps` would have, starting from the weights as they were rounded."""
    study = Study(pruned)
    dense = study.perplexities(study.layers)
    layers: Layers = list(Model.mapped(Source(pruned).checkpoint).layers)
    _print([pruned.name], study.perplexities(layers), dense)
    trained = study.distilled(layers, len(study.text), steps)
    _print([f"{pruned.name}, {steps} steps"], study.perplexities(trained), dense)


def _print(names: list[str], found: Sequence[float], dense: Sequence[float]) -> None:
    ratios = [f"{value / base:.2f}" for value, base in zip(found, dense, strict=True)]
    print(line([*names, *ratios]), flush=True)


app = script(__doc__, instead, distil)

if __name__ == "__main__":
    app()
