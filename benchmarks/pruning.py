"""What pruning costs and saves: methods over seeds, and pruning ratio x KV budget.

    python benchmarks/pruning.py methods WORK
    python benchmarks/pruning.py frontier WORK
    python benchmarks/pruning.py speed BASE PRUNED
    python benchmarks/pruning.py train SMALL
    python benchmarks/pruning.py methods WORK --model SMALL --corpus mansfield-park --corpus persuasion

WORK keeps the pruned models and what was measured; a run that was stopped goes on there.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import trange
from transformers import Qwen3Config, Qwen3ForCausalLM

from curkv.bench.script import Model, script
from curkv.config import EngineOptions, Weights
from curkv.engine.build import build_engine
from curkv.engine.engine import Engine
from curkv.evaluation.corpora import load_corpus
from curkv.evaluation.measures import group
from curkv.evaluation.perplexity import Logits, compare, dense_logits, token_windows
from curkv.evaluation.records import Record, read_records
from curkv.evaluation.run import Plan, run_local
from curkv.evaluation.variants import Variant, cross
from curkv.kernels.dispatch import get_kernels
from curkv.models.decoder import Decoder
from curkv.models.loading import load_config, load_tokenizer, resolve_model
from curkv.models.loading.built_in import DEFAULT_MODEL
from curkv.models.loading.checkpoint import Checkpoint
from curkv.models.pruning.prune import PruneOptions, prune
from curkv.models.pruning.self_text import TEXT_FILE, Writing
from curkv.models.pruning.source import Source
from curkv.tables import table

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "random": ("random", {}),
    "prunenet": ("prunenet", {}),
    "magnitude": ("magnitude", {}),
    "self-calibrated --no-compensate": ("self-calibrated", {"compensate": False}),
    "self-calibrated --sequences 32": ("self-calibrated", {"writing": Writing(32)}),
    "self-calibrated": ("self-calibrated", {}),
    "self-calibrated --distil-steps 64": ("self-calibrated", {"distil_steps": 64}),
}
UNSEEDED = ("magnitude",)
CORPORA = ("mansfield-park", "documentation")
WINDOW_TOKENS = 512
MIB = 2**20
SMALL: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
ROUNDS, STEPS = 15, 8
"""How often decode steps are timed, and how many at a time."""

Key = TypeVar("Key")


@dataclass(frozen=True)
class Result:
    """A pruned model on one held-out text; the measures are those of `evaluation.perplexity.Comparison`."""

    method: str
    ratio: float
    seed: int
    corpus: str
    windows: int
    perplexity: float
    base_perplexity: float
    kl: float
    top1: float


def methods(
    work: Path,
    model: Model = DEFAULT_MODEL,
    method: Annotated[list[str] | None, typer.Option(help="Repeatable. [all]")] = None,
    ratio: Annotated[list[float] | None, typer.Option(help="Repeatable. [0.25]")] = None,
    corpus: Annotated[list[str] | None, typer.Option(help="Repeatable. [one novel, documentation]")] = None,
    seeds: Annotated[int, typer.Option(help="Of each method.")] = 3,
    windows: Annotated[int, typer.Option(help="Of 512 tokens of each text.")] = 4,
) -> None:
    """Measure every method with several seeds on held-out texts."""
    base, path = Source(resolve_model(model)), work / "methods.jsonl"
    tokenizer, reference = load_tokenizer(base.directory), _remembered(_load(base.directory))
    done = _read(path)
    texts = {
        name: token_windows(tokenizer, load_corpus(name), WINDOW_TOKENS, windows)
        for name in corpus or CORPORA
    }
    for name in method or METHODS:
        for share in ratio or [0.25]:
            for seed in range(1 if name in UNSEEDED else seeds):
                missing = {
                    text: ids
                    for text, ids in texts.items()
                    if (name, share, seed, text, windows) not in {_key(result) for result in done}
                }
                if missing:
                    logits = _load(_pruned(base, work, name, share, seed))
                for text, ids in missing.items():
                    found = compare(reference, logits, ids)
                    result = Result(
                        *(name, share, seed, text, windows),
                        *(found.perplexity, found.reference_perplexity, found.kl, found.top1),
                    )
                    done.append(result)
                    with path.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(asdict(result)) + "\n")
    print(_methods_table(done))


def _key(result: Result) -> tuple[str, float, int, str, int]:
    return result.method, result.ratio, result.seed, result.corpus, result.windows


def _read(path: Path) -> list[Result]:
    if not path.exists():
        return []
    return [Result(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def _load(directory: Path) -> Logits:
    config = load_config(directory)
    return dense_logits(Decoder(config, Checkpoint(directory, config), get_kernels("auto")))


def _remembered(logits: Logits) -> Logits:
    """Computes each window once: the reference is asked for every model."""
    known: dict[tuple[int, ...], Tensor] = {}

    def remembered(ids: Tensor) -> Tensor:
        key = tuple(ids.tolist())
        if key not in known:
            known[key] = logits(ids)
        return known[key]

    return remembered


def _pruned(base: Source, work: Path, name: str, ratio: float, seed: int) -> Path:
    """Prunes unless that has been done; the text of a seed is written once."""
    directory = work / f"{name.replace(' --', '-')}-{ratio:g}-{seed}"
    if not directory.exists():
        method, settings = METHODS[name]
        texts = sorted(work.glob(f"self-calibrated-[0n]*-{seed}/{TEXT_FILE}"))  # not those of a few sequences
        if method == "self-calibrated" and "writing" not in settings and texts:
            settings = settings | {"text": texts[0]}
        options = PruneOptions(method, ratio, seed, settings=settings)
        result = prune(base, "base", directory, options, lambda *_: None)
        print(f"{directory}: {result.seconds:.0f} s", flush=True)
    return directory


def _methods_table(results: Iterable[Result]) -> str:
    header = ["method", "ratio", "seeds", "text", "perplexity / base", "KL", "same top token"]
    rows = []
    for (name, ratio, corpus), found in group(results, lambda r: (r.method, r.ratio, r.corpus)).items():
        ratios = [result.perplexity / result.base_perplexity for result in found]
        rows.append(
            [
                f"`{name}`",
                f"{ratio:.0%}",
                str(len(found)),
                corpus,
                _spread(ratios, "{:.2f}"),
                _spread([result.kl for result in found], "{:.2f}"),
                _spread([result.top1 for result in found], "{:.0%}"),
            ]
        )
    return table(header, rows)


def _spread(values: Sequence[float], format: str) -> str:
    """The median and, of several values, the least and the largest."""
    middle, low, high = (
        format.format(value) for value in (statistics.median(values), min(values), max(values))
    )
    return f"{middle} ({low} to {high})" if len(values) > 1 else middle


@dataclass(frozen=True)
class Point:
    """A pruned model that keeps a share of its cache.

    Attributes:
        ratio: Share of the MLP rows asked to be removed.
        weights: Their type.
        policy: With its options.
        budget: "" for the full cache.
        perplexity: Of the text that follows a prompt.
        score: Exact match of tasks with an answer.
        weights_bytes: Memory of the weights.
        kv_bytes: Memory of the sequences' caches.
        speed: Tokens per second, all sequences together.
    """

    ratio: float
    weights: Weights
    policy: str
    budget: str
    perplexity: float
    score: float
    weights_bytes: int
    kv_bytes: int
    speed: float


def frontier(
    work: Path,
    model: Model = DEFAULT_MODEL,
    ratio: Annotated[list[float] | None, typer.Option(help="Repeatable. [0, 0.2, 0.25, 0.3]")] = None,
    policy: Annotated[list[str] | None, typer.Option(help="As for `curkv eval`. [adacurdkv]")] = None,
    budget: Annotated[list[str] | None, typer.Option(help="Repeatable. [50%, 25%]")] = None,
    weights: Annotated[list[str] | None, typer.Option(help="Repeatable. [float32, int8]")] = None,
    corpus: str = "mansfield-park",
    prompt_tokens: int = 1000,
    samples: Annotated[int, typer.Option(help="Of each task.")] = 4,
    sequences: Annotated[int, typer.Option(help="Whose memory and decoding is measured.")] = 8,
    plot: Annotated[Path | None, typer.Option(help="Draw the table into this file.")] = None,
) -> None:
    """Measure quality, memory and speed at every pruning ratio, type of weights and KV budget."""
    base = Source(resolve_model(model))
    plan = Plan(
        tasks=["continuation", "qa_fact"],
        lengths=[prompt_tokens],
        seeds=range(samples),
        corpora=[corpus],
        protocols=["visible"],
        variants=cross(policy or ["adacurdkv"], budget or ["50%", "25%"]),
    )
    directories = {
        share: _pruned(base, work, "self-calibrated", share, seed=0) if share else base.directory
        for share in ratio or [0, 0.2, 0.25, 0.3]
    }
    options = {
        (kind, share): EngineOptions(
            model=str(directory), weights=kind, kv_cache_memory=512 * MIB, prefix_cache_memory=0
        )
        for kind in cast(list[Weights], weights or ["float32", "int8"])
        for share, directory in directories.items()
    }
    records = {}
    for (kind, share), engine_options in options.items():
        path = work / f"frontier-{kind}.jsonl"
        run_local(plan, engine_options, path, workers=1)
        for variant in plan.variants:
            records[kind, share, variant] = [
                record
                for record in read_records(path)
                if record.source.startswith(f"{directories[share]}, ")
                and (record.policy, record.budget) == (variant.policy, variant.budget)
            ]
    engines = {key: build_engine(engine_options) for key, engine_options in options.items()}
    speeds = _speeds(
        {key: (engines[key[:2]], _kept_tokens(found)) for key, found in records.items()}, sequences, ROUNDS
    )
    points = [_point(*key, found, engines[key[:2]], speeds[key], sequences) for key, found in records.items()]
    print(_frontier_table(points))
    if plot:
        _plot(points, plot)


def _kept_tokens(records: Iterable[Record]) -> int:
    """Tokens that a head holds, mean over heads and samples."""
    return round(statistics.fmean(record.kept_ratio * record.prompt_tokens for record in records))


def _point(
    weights: Weights,
    ratio: float,
    variant: Variant,
    records: Sequence[Record],
    engine: Engine,
    speed: float,
    sequences: int,
) -> Point:
    layout = engine.kv.layout
    return Point(
        ratio,
        weights,
        variant.policy,
        variant.budget,
        perplexity=math.exp(statistics.fmean(r.nll or 0.0 for r in records if r.kl is not None)),
        score=statistics.fmean(r.score for r in records if r.score is not None),
        weights_bytes=sum(engine.runner.model.weights_bytes.values()),
        kv_bytes=sequences * layout.sequence_pages(_kept_tokens(records)) * layout.page_bytes,
        speed=speed,
    )


def _speeds(cases: dict[Key, tuple[Engine, int]], sequences: int, rounds: int) -> dict[Key, float]:
    """Tokens per second of each case; rounds alternate, so that other load on the machine falls on all."""
    seconds = [
        {key: _decode_seconds(*case, sequences) for key, case in cases.items()} for _ in range(rounds + 1)
    ][1:]
    return {key: sequences / statistics.median(times[key] for times in seconds) for key in cases}


def _decode_seconds(engine: Engine, tokens: int, sequences: int) -> float:
    """Seconds of a decode step behind so many cached tokens; what they are does not change the work."""
    slots = [engine.kv.add_sequence() for _ in range(sequences)]
    engine.kv.extend(slots, [tokens] * sequences)
    started = time.perf_counter()
    for step in range(STEPS):
        engine.runner.run(slots, [[0]] * sequences, [tokens + step] * sequences)
    seconds = (time.perf_counter() - started) / STEPS
    for slot in slots:
        engine.kv.free(slot)
    return seconds


def _frontier_table(points: Sequence[Point]) -> str:
    """Speeds are relative to that of the first point; they were taken in turns."""
    header = [
        "weights",
        "rows removed",
        "cache",
        "perplexity",
        "right answers",
        "weights",
        "caches",
        "speed",
    ]
    rows = [
        [
            point.weights,
            f"{point.ratio:.0%}",
            f"`{point.policy}` {point.budget}",
            f"{point.perplexity:.1f}",
            f"{point.score:.0%}",
            f"{point.weights_bytes / MIB:.0f} MiB",
            f"{point.kv_bytes / MIB:.0f} MiB",
            f"{point.speed / points[0].speed:.2f}",
        ]
        for point in points
    ]
    return table(header, rows)


def _plot(points: Sequence[Point], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    memory, speed = figure.subplots(1, 2, sharey=True)
    colours: dict[float, str] = {}
    for (ratio, weights), found in group(points, lambda point: (point.ratio, point.weights)).items():
        label = (f"{ratio:.0%} of the rows removed" if ratio else "not pruned") + f", {weights}"
        colour = colours.setdefault(ratio, f"C{len(colours)}")
        style: dict[str, Any] = {"color": colour, "label": label}
        style |= {"linestyle": "--", "marker": "s"} if weights == "int8" else {"marker": "o"}
        perplexities = [point.perplexity for point in found]
        sizes = [(point.weights_bytes + point.kv_bytes) / MIB for point in found]
        speeds = [point.speed / points[0].speed for point in found]
        for axes, values in ((memory, sizes), (speed, speeds)):
            axes.plot(values, perplexities, **style)
            for spot, point in zip(zip(values, perplexities, strict=True), found, strict=True):
                name = point.budget or "full"
                axes.annotate(name, spot, (0, 6), textcoords="offset points", fontsize="x-small", ha="center")
    memory.set(xlabel="weights and caches, MiB", ylabel="perplexity of what follows")
    speed.set(xlabel=f"decode speed; not pruned, {points[0].weights}, full cache = 1")
    for axes in (memory, speed):
        axes.margins(0.1)
        axes.grid(alpha=0.3)
    figure.legend(*memory.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(path, dpi=130)


def speed(
    base: str,
    pruned: str,
    sequences: Annotated[list[int] | None, typer.Option(help="Repeatable. [1, 8]")] = None,
    tokens: Annotated[int, typer.Option(help="Cached tokens of each.")] = 500,
    rounds: int = 15,
) -> None:
    """Time decode steps of a model and of what pruning left of it, with float32 and int8 weights."""
    kinds: list[Weights] = ["float32", "int8"]
    engines = {
        (kind, model): build_engine(
            EngineOptions(model=model, weights=kind, kv_cache_memory=512 * MIB, prefix_cache_memory=0)
        )
        for kind in kinds
        for model in (base, pruned)
    }
    rows = []
    for count in sequences or [1, 8]:
        speeds = _speeds({key: (engine, tokens) for key, engine in engines.items()}, count, rounds)
        for kind in kinds:
            before, after = speeds[kind, base], speeds[kind, pruned]
            bound = _bytes_read(engines[kind, base]) / _bytes_read(engines[kind, pruned])
            rows.append(
                [
                    kind,
                    str(count),
                    f"{before:.1f}",
                    f"{after:.1f}",
                    f"{after / before:.2f}",
                    f"{bound:.2f}",
                ]
            )
    print(table(["weights", "sequences", "base, tokens/s", "pruned, tokens/s", "gain", "bound"], rows))


def _bytes_read(engine: Engine) -> int:
    """Weights that a decode step reads; of the embedding it reads a row."""
    kinds = engine.runner.model.weights_bytes
    return sum(kinds.values()) - kinds["embedding"]


def train(directory: Path, novel: str = "emma", steps: int = 250, seed: int = 0) -> None:
    """Train a Qwen3 of a million weights on a novel: a second family, and a model that has seen little."""
    torch.manual_seed(seed)
    text = load_corpus(novel)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [text],
        trainers.BpeTrainer(
            vocab_size=SMALL["vocab_size"], special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
        ),
    )
    ids = torch.tensor(tokenizer.encode(text).ids)
    network = Qwen3ForCausalLM(Qwen3Config(**SMALL))  # type: ignore[no-untyped-call]
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.0, weight_decay=0.05)
    for step in (bar := trange(steps)):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        starts = torch.randint(len(ids) - 128, (16, 1))
        batch = ids[starts + torch.arange(128)]
        batch[:, 0] = SMALL["bos_token_id"]
        loss = network(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(perplexity=f"{loss.exp():.1f}")
    network.save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))


app = script(__doc__, methods, frontier, speed, train)

if __name__ == "__main__":
    app()
