"""What pruning costs and gains: a pruned model beside its base and beside rows chosen at random."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from curkv.config import EngineOptions
from curkv.engine.build import build_engine
from curkv.engine.engine import Engine
from curkv.evaluation.corpora import load_corpus
from curkv.evaluation.evaluator import Evaluator
from curkv.evaluation.perplexity import Comparison, compare, dense_logits, token_windows
from curkv.evaluation.tasks.base import Recipe
from curkv.evaluation.variants import FULL
from curkv.models.pruning.ks import ks_distance, singular_values
from curkv.models.pruning.plan import PruningError
from curkv.models.pruning.prune import PruneOptions, prune
from curkv.models.pruning.source import Source

CACHE_BYTES = 1 << 28
SPEED_ROUNDS = 5
PREFILL_TOKENS = 512
DECODE_STEPS = 16


@dataclass(frozen=True, slots=True)
class ReportOptions:
    """How much is measured.

    Attributes:
        corpora: Held-out texts; none of the methods has seen them, since they calibrate on nothing or on text
            that the model wrote itself.
        windows: Windows of each.
        window_tokens: Tokens of a window.
        tasks: Tasks with an answer.
        task_tokens: Length of their prompts.
        samples: Of each task.
        seed: Of windows, samples and the random baseline.
    """

    corpora: Sequence[str] = ("documentation",)
    windows: int = 8
    window_tokens: int = 512
    tasks: Sequence[str] = ("needle", "niah_single_1", "niah_multikey_2")
    task_tokens: int = 1000
    samples: int = 4
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Size:
    """Weights of a model.

    Attributes:
        parameters: Elements of all tensors.
        bytes: Of the weight files.
        mlp: Elements of the MLPs.
        read: Elements read for each token: all but an embedding that is not also the head.
    """

    parameters: int
    bytes: int
    mlp: int
    read: int


@dataclass(frozen=True, slots=True)
class Speed:
    """Medians over alternating rounds.

    Attributes:
        prefill: Prompt tokens per second, `PREFILL_TOKENS` at once.
        decode: Steps per second of one sequence behind such a prompt.
    """

    prefill: float
    decode: float


@dataclass(frozen=True, slots=True)
class Quality:
    """A model beside its base.

    Attributes:
        text: By corpus.
        scores: Share of right answers by task.
        ks: KS distance of the spectra of gate_proj, by layer.
    """

    text: dict[str, Comparison]
    scores: dict[str, float]
    ks: list[float]


@dataclass(frozen=True, slots=True)
class PruningReport:
    """Everything that was measured.

    Attributes:
        provenance: The pruned model's.
        options: What was measured.
        base_size: Weights of the base.
        size: Weights of the pruned model.
        base_scores: Share of right answers of the base by task.
        qualities: By name, "pruned" and "random rows".
        base_speed: Of the base.
        speed: Of the pruned model.
    """

    provenance: dict[str, Any]
    options: ReportOptions
    base_size: Size
    size: Size
    base_scores: dict[str, float]
    qualities: dict[str, Quality]
    base_speed: Speed
    speed: Speed

    @property
    def mlp_share_removed(self) -> float:
        """r: share of the MLP weights that are gone."""
        return 1 - self.size.mlp / self.base_size.mlp

    @property
    def mlp_share_read(self) -> float:
        """f: share of the weights read per token that were the MLPs'."""
        return self.base_size.mlp / self.base_size.read

    @property
    def speed_bound(self) -> float:
        """1 / (1 - r f): what a decode that does nothing but read weights would gain."""
        return 1 / (1 - self.mlp_share_removed * self.mlp_share_read)


def measure(base: Path, pruned: Path, options: ReportOptions) -> PruningReport:
    """Measures a pruned model, its base and a random choice of as many rows.

    Args:
        base: Directory of the model before.
        pruned: Directory of the model after.
        options: How much is measured.

    Raises:
        PruningError: The second model is not the first one pruned.
    """
    before, after = Source(base), Source(pruned)
    _check_related(before, after)
    engine, pruned_engine = _engine(base), _engine(pruned)
    base_speed, speed = _speeds([engine, pruned_engine], options.seed)
    base_scores = _scores(engine, options)
    qualities = {"pruned": _quality(before, engine, after, pruned_engine, options)}
    del pruned_engine
    with tempfile.TemporaryDirectory() as scratch:
        random = _random_rows(before, after.config.intermediate_size, Path(scratch) / "random", options.seed)
        qualities["random rows"] = _quality(before, engine, random, _engine(random.directory), options)
    return PruningReport(
        provenance=after.provenance or {},
        options=options,
        base_size=measure_size(before),
        size=measure_size(after),
        base_scores=base_scores,
        qualities=qualities,
        base_speed=base_speed,
        speed=speed,
    )


def measure_size(source: Source) -> Size:
    """Counts the weights of a model."""
    elements = {name: math.prod(source.shape(name)) for name in source.names}
    total = sum(elements.values())
    looked_up = 0 if source.config.tie_embeddings else elements["model.embed_tokens.weight"]
    mlp = sum(count for name, count in elements.items() if ".mlp." in name)
    return Size(total, source.bytes, mlp, total - looked_up)


def _check_related(before: Source, after: Source) -> None:
    width, kept = before.config.intermediate_size, after.config.intermediate_size
    if replace(after.config, intermediate_size=width) != before.config or kept >= width:
        raise PruningError(f"{after.directory} is not {before.directory} with fewer MLP rows")


def _engine(directory: Path) -> Engine:
    return build_engine(
        EngineOptions(
            model=str(directory), weights="float32", kv_cache_memory=CACHE_BYTES, prefix_cache_memory=0
        )
    )


def _random_rows(source: Source, kept: int, directory: Path, seed: int) -> Source:
    """Prunes to the same width by the baseline method."""
    options = PruneOptions("random", 1 - kept / source.config.intermediate_size, seed, align=1)
    prune(source, "base", directory, options, lambda *_: None)
    return Source(directory)


def _quality(
    before: Source, engine: Engine, after: Source, pruned_engine: Engine, options: ReportOptions
) -> Quality:
    reference, model = dense_logits(engine.runner.model), dense_logits(pruned_engine.runner.model)
    text = {}
    for corpus in options.corpora:
        windows = token_windows(
            engine.info.tokenizer, load_corpus(corpus), options.window_tokens, options.windows, options.seed
        )
        text[corpus] = compare(reference, model, tqdm(windows, corpus, leave=False))
    layers = range(before.config.num_layers)
    ks = [ks_distance(_gate_spectrum(before, layer), _gate_spectrum(after, layer)) for layer in layers]
    return Quality(text, _scores(pruned_engine, options), ks)


def _gate_spectrum(source: Source, layer: int) -> Tensor:
    return singular_values(source.tensor(f"model.layers.{layer}.mlp.gate_proj.weight"))


def _scores(engine: Engine, options: ReportOptions) -> dict[str, float]:
    evaluator = Evaluator(engine, "")
    scores: dict[str, list[float]] = defaultdict(list)
    recipes = [
        Recipe(task, options.task_tokens, options.seed + sample, options.corpora[0])
        for task in options.tasks
        for sample in range(options.samples)
    ]
    for recipe in tqdm(recipes, "tasks", leave=False):
        (record,) = evaluator.evaluate(recipe, {"visible": [FULL]})
        scores[recipe.task].append(record.score or 0.0)
    return {task: statistics.fmean(found) for task, found in scores.items()}


def _speeds(engines: Sequence[Engine], seed: int) -> list[Speed]:
    """Times the models in turns, so that whatever else the machine does falls on both."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = min(engine.runner.model.config.vocab_size for engine in engines)
    prompt = torch.randint(vocabulary, (PREFILL_TOKENS,), generator=generator).tolist()
    rounds = [[_time(engine, prompt) for engine in engines] for _ in range(SPEED_ROUNDS + 1)][1:]
    return [
        Speed(
            PREFILL_TOKENS / statistics.median(times[i][0] for times in rounds),
            DECODE_STEPS / statistics.median(times[i][1] for times in rounds),
        )
        for i in range(len(engines))
    ]


def _time(engine: Engine, prompt: list[int]) -> tuple[float, float]:
    """Returns the seconds of a prefill and of the decode steps behind it."""
    slot = engine.kv.add_sequence()
    started = time.perf_counter()
    engine.runner.run([slot], [prompt], [0])
    prefilled = time.perf_counter()
    for step in range(DECODE_STEPS):
        engine.runner.run([slot], [prompt[step : step + 1]], [len(prompt) + step])
    ended = time.perf_counter()
    engine.kv.free(slot)
    return prefilled - started, ended - prefilled
