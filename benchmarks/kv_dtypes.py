"""What formats of the KV cache cost in quality, with the full cache and with a part of it, at how many bytes.

    python benchmarks/kv_dtypes.py measure results.jsonl [--model gemma-3-270m] [--windows 6]
    python benchmarks/kv_dtypes.py report results.jsonl [--plot frontier.png]
    python benchmarks/kv_dtypes.py demoted answers.jsonl [--protocol hidden --policy kvzip]
    python benchmarks/kv_dtypes.py speed [--model gemma-3-270m]
    python benchmarks/kv_dtypes.py entropy

A window of text is computed in chunks over a cache of each format, all but the tokens at its end, that are
then predicted with the full cache and with what each policy keeps at each share. What has no kernels is
simulated: its numbers are rounded as it would round them, over a float32 cache. Schemes that compress a
prompt once it is computed round what is kept of it but for its newest 32 tokens, whose bytes are not counted,
as those of new tokens are not. Everything is held against a float32 cache that keeps all tokens. `measure`
adds what `results.jsonl` does not have yet. `demoted` asks questions: an eviction of an int8 cache keeps a
share of the tokens, or more of them in fewer bits and as many bytes. `speed` serves the same prompts over a
cache of each format, in turns step by step, so that formats meet the same machine.
"""

from __future__ import annotations

import json
import math
import statistics
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from tqdm import tqdm

from curkv.bench.script import Model, script, submit
from curkv.bench.text import token_spans
from curkv.cache.attention import PagedAttention
from curkv.cache.eviction import select
from curkv.cache.layout import CacheLayout, full_attention
from curkv.cache.page_manager import PageManager
from curkv.cache.parsing import parse_options, settle
from curkv.cache.plan import EvictionPlan, resolve
from curkv.cache.transfer import copy_out
from curkv.cache.view import CacheView
from curkv.config import EngineOptions
from curkv.engine.build import build_engine
from curkv.engine.engine import Engine
from curkv.engine.runner import Runner
from curkv.engine.types import SamplingParams
from curkv.evaluation.corpora import load_corpus
from curkv.evaluation.evaluator import Evaluator
from curkv.evaluation.perplexity import agreement, token_nll, token_windows
from curkv.evaluation.records import Journal, ProtocolName, read_records
from curkv.evaluation.run import Plan
from curkv.evaluation.tasks import TASKS
from curkv.evaluation.variants import Variant, cross, parse_variant
from curkv.kernels.dispatch import Kernels, get_kernels
from curkv.kernels.formats import KV_FORMATS, get_format
from curkv.kernels.formats.base import VectorFormat
from curkv.kernels.formats.int4 import GROUP, Int4
from curkv.kernels.pages import SIDE_BYTES, Pages
from curkv.models.decoder import Decoder
from curkv.models.loading import load_config, load_tokenizer, resolve_model
from curkv.models.loading.built_in import DEFAULT_MODEL
from curkv.models.loading.checkpoint import Checkpoint
from curkv.models.rope import rope_tables
from curkv.tables import table

BUILT = [name for name in KV_FORMATS if "cpu" in get_format(name).devices]
CHUNK = 512
POLICIES: dict[str, dict[str, Any]] = {
    "snapcur": {"policy": "snapcur"},
    "compactor": {"policy": "compactor", "allocation": "adaptive"},
}
SHARES = (0.5, 0.25, 0.125)
MIXES = (0.0, 0.25, 0.5)
"""Of a mixed cache's bytes, what tokens of 8 bits take."""
DENSE = 32
"""Newest tokens of a prompt that is compressed once it is computed, which stay as they are."""

Rounding = Callable[[Tensor], Tensor]
"""Rounds new keys, or values, of a chunk: float32 [tokens, heads, head_dim] to the same."""
Choice = Callable[[int, Tensor], Tensor]
"""Tells, of a layer and the positions of its tokens, int [H, n], which are meant: bool [H, n]."""


@dataclass(frozen=True)
class Contender:
    """A way to hold keys and values.

    Attributes:
        name: In tables.
        format: Of the cache that it is run over.
        bytes: Of a token in a head, side arrays included.
        keys, values: What a simulated one rounds with.
        after: Whether it rounds what is kept of a prompt once that is computed, not each chunk.
    """

    name: str
    format: str
    bytes: float
    keys: Rounding | None = None
    values: Rounding | None = None
    after: bool = False


@dataclass(frozen=True)
class Result:
    """A contender on a window of text: sums over its tokens.

    Attributes:
        corpus, window, contender: What.
        policy, share: What was kept of the prompt; "" for all tokens of a window, none of which went.
        bytes: Per token of the prompt and head.
        tokens: Predicted.
        nll, exact_nll, kl, top1: Sums.
    """

    corpus: str
    window: int
    contender: str
    policy: str
    share: float
    bytes: float
    tokens: int
    nll: float
    exact_nll: float
    kl: float
    top1: float


def through(format: VectorFormat) -> Rounding:
    """Rounds as a format does."""
    return lambda x: format.decode(format.encode(x))


def rotated(rounding: Rounding) -> Rounding:
    """Rounds what a Hadamard transform has mixed, and turns it back."""

    def rounded(x: Tensor) -> Tensor:
        matrix = torch.ones(1, 1)
        while len(matrix) < x.shape[-1]:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        matrix /= math.sqrt(len(matrix))
        return rounding(x @ matrix) @ matrix

    return rounded


def grid(bits: int) -> Rounding:
    """Rounds groups of 32 channels to evenly spaced values, as `Int4` does with 4 bits."""

    def rounded(x: Tensor) -> Tensor:
        groups = x.reshape(*x.shape[:-1], -1, GROUP)
        low, high = groups.aminmax(dim=-1, keepdim=True)
        step, low = ((high - low) / (2**bits - 1)).half().float(), low.half().float()
        codes = ((groups - low) / step.where(step > 0, 1.0)).round().clamp(0, 2**bits - 1)
        vectors: Tensor = (codes * step + low).reshape(x.shape)
        return vectors

    return rounded


def sparse(share: float) -> Rounding:
    """Mustafar (2505.22913): the largest magnitudes of each vector as float16."""

    def rounded(x: Tensor) -> Tensor:
        count = round(share * x.shape[-1])
        least = x.abs().topk(count, -1).values[..., -1:]
        return torch.where(x.abs() >= least, x, 0.0).half().float()

    return rounded


def gear(rank: int, outliers: float, bits: int) -> Rounding:
    """GEAR (2403.05527): outliers apart, the rest rounded, and what that loses as a product of low rank."""

    def rounded(x: Tensor) -> Tensor:
        count = max(1, round(outliers * x.shape[-1] / 2))
        extreme = torch.zeros_like(x, dtype=torch.bool)
        for largest in (False, True):
            extreme.scatter_(-1, x.topk(count, -1, largest=largest).indices, True)
        rest = torch.where(extreme, x.mean(-1, keepdim=True), x)
        base = grid(bits)(rest)
        u, s, v = torch.linalg.svd(rest - base, full_matrices=False)
        residual = (u[..., :rank] * s[..., None, :rank]).half().float() @ v[..., :rank, :].half().float()
        return torch.where(extreme, x.half().float(), base + residual)

    return rounded


def contenders(head_dim: int) -> list[Contender]:
    """Every format, then what is simulated."""
    built = [name for name in BUILT if name != "float32"]
    real = [Contender(n, n, get_format(n).token_bytes(head_dim) + SIDE_BYTES) for n in built]
    int4, four = through(Int4()), Int4().token_bytes(head_dim)

    def after(name: str, keys: Rounding, values: Rounding, vector: float) -> Contender:
        return Contender(name, "float32", 2 * vector + SIDE_BYTES, keys, values, True)

    def mustafar(share: float) -> Contender:
        """A bitmap, and float16 values padded to eights."""
        vector = head_dim / 8 + 2 * (-(-round(share * head_dim) // 8) * 8)
        return after(f"Mustafar {1 - share:.0%}", sparse(share), sparse(share), vector)

    def low_rank(bits: int) -> Contender:
        """Codes, ranges, two factors in float16, and the value and place of each outlier."""
        outliers = 2 * max(1, round(0.02 * head_dim / 2))
        vector = head_dim * bits / 8 + head_dim / GROUP * 4 + 2 * 4 * (1 + head_dim / CHUNK) + 3 * outliers
        return after(f"GEAR {bits} bits", gear(4, 0.02, bits), gear(4, 0.02, bits), vector)

    rotated_keys = Contender("int4, keys rotated", "float32", 2 * four + SIDE_BYTES, rotated(int4), int4)
    return [
        *real,
        rotated_keys,
        after("int4, keys rotated, after the prompt", rotated(int4), int4, four),
        mustafar(0.5),
        mustafar(0.3),
        low_rank(4),
        low_rank(2),
    ]


class Lab:
    """A model over caches of contenders."""

    def __init__(self, name: str) -> None:
        """Loads the model."""
        directory = resolve_model(name)
        self.config = load_config(directory)
        self.kernels = get_kernels("cpu")
        self.tokenizer = load_tokenizer(directory)
        self.model = Decoder(self.config, Checkpoint(directory, self.config), self.kernels)
        self.rope = rope_tables(self.config, self.config.max_positions)

    def runner(self, one: Contender, tokens: int) -> Runner:
        """An empty cache that holds eight sequences of so many tokens."""
        config = self.config
        layers = full_attention(config.num_layers, config.num_kv_heads)
        layout = CacheLayout(layers, config.head_dim, 64, get_format(one.format), 8, config.max_positions)
        kv = PageManager(layout, 8 * layout.sequence_pages(tokens), rounding_kernels(self.kernels, one))
        return Runner(self.model, PagedAttention(kv, self.rope))


def rounding_kernels(kernels: Kernels, one: Contender) -> Kernels:
    """Kernels that round new keys, after RoPE, and values."""
    if one.keys is None or one.values is None or one.after:
        return kernels
    round_keys, round_values = one.keys, one.values

    def store_kv(
        pages: Pages,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        table: Tensor,
        lengths: Tensor,
        slots: Tensor,
        query_start: Tensor,
        q: Tensor | None = None,
    ) -> None:
        k = k.clone(memory_format=torch.contiguous_format)
        kernels.rope(k, cos, sin, positions)
        k = round_keys(k)
        kernels.rope(k, cos, -sin, positions)
        where = positions, table, lengths, slots, query_start, q
        kernels.store_kv(pages, k, round_values(v), cos, sin, *where)

    return replace(kernels, store_kv=store_kv)


def feed(runner: Runner, slot: int, ids: list[int], start: int) -> Tensor:
    """Computes tokens in chunks; the logits of all of them."""
    rows = [
        runner.run([slot], [ids[i : i + CHUNK]], [start + i], [len(ids[i : i + CHUNK])]).clone()
        for i in range(0, len(ids), CHUNK)
    ]
    return torch.cat(rows)


def compress(runner: Runner, slot: int, keys: Rounding, values: Rounding, exempt: Choice) -> None:
    """Rounds what is stored of a sequence but for the tokens that are exempt.

    Args:
        runner: Over the cache.
        slot: The sequence, which shares no page.
        keys, values: Round float32 [H, n, head_dim].
        exempt: Which those are.
    """
    view = runner.attention.view(slot)
    for layer in range(view.num_layers):
        position = view.position[layer]
        there = (torch.arange(position.shape[-1]) < view.lengths[layer][:, None])[..., None]
        as_is = exempt(layer, position)[..., None]
        k, v = (x.where(there, 0.0) for x in (view.keys(layer), view.values(layer)))
        runner.kv.overwrite(slot, layer, torch.where(as_is, k, keys(k)), torch.where(as_is, v, values(v)))


def nothing(layer: int, position: Tensor) -> Tensor:
    """No token of a layer."""
    return torch.zeros_like(position, dtype=torch.bool)


def kept_by(view: CacheView, plan: EvictionPlan, kernels: Kernels) -> Choice:
    """The tokens that a plan keeps."""
    indices, _ = select(view, plan, kernels)
    kept = view.position.gather(-1, indices.long().clamp_min(0)).where(indices >= 0, -1)
    return lambda layer, position: (position[..., None] == kept[layer][:, None]).any(-1)


def measure_window(
    lab: Lab, one: Contender, ids: list[int], decoded: int, policies: dict[str, dict[str, Any]]
) -> Iterator[tuple[str, float, float, Tensor]]:
    """Policy, share, bytes per token of the prompt and head, and the logits of the last tokens, or of all."""
    runner, kv = (found := lab.runner(one, len(ids))), found.kv
    prompt, tail = ids[:-decoded], ids[-decoded:]
    needs = None
    for options in policies.values():
        more = settle(parse_options({**options, "budget": "50%"})).policy.needs
        needs = more if needs is None else needs | more
    slot = kv.add_sequence(needs)
    first = feed(runner, slot, prompt, 0)

    def planned(options: dict[str, Any], share: float) -> EvictionPlan:
        budget = parse_options({**options, "budget": f"{100 * share:.6g}%"})
        return resolve(budget, range(len(prompt)), kv.layout)

    def evicted(options: dict[str, Any], share: float) -> int:
        fork = kv.fork(slot, observe=False)
        plan = planned(options, share)
        kv.evict(fork, *select(runner.attention.view(slot), plan, kv.kernels))
        return fork

    def rounded(slot: int) -> int:
        if one.after and one.keys is not None and one.values is not None:
            compress(runner, slot, one.keys, one.values, lambda _, p: p >= len(prompt) - DENSE)
        return slot

    def mixed(options: dict[str, Any], share: float, mix: float, high: float) -> int:
        """As many bytes as without, `mix` of them for tokens of 8 bits that take `high` each."""
        low = 2 * Int4().token_bytes(lab.config.head_dim) + SIDE_BYTES
        high_share = mix * share * one.bytes / high
        low_share = (1 - mix) * share * one.bytes / low
        fork = evicted(options, min(1.0, high_share + low_share))
        exempt: Choice = nothing
        if mix:
            exempt = kept_by(runner.attention.view(slot), planned(options, high_share), kv.kernels)
        four = through(Int4())
        compress(runner, fork, rotated(four), four, exempt)
        return fork

    for policy, options in policies.items():
        for share in SHARES:
            forks = {policy: rounded(evicted(options, share))}
            if one.name == "int8":
                two_pages = 2 * (2 * Int4().token_bytes(lab.config.head_dim) + SIDE_BYTES)
                named = f"{policy}, {{:.0%}} of the bytes in 8 bits"
                forks |= {named.format(mix): mixed(options, share, mix, one.bytes) for mix in MIXES}
                forks[f"{named.format(0.25)} of two pages"] = mixed(options, share, 0.25, two_pages)
            for name, fork in forks.items():
                yield name, share, share * one.bytes, feed(runner, fork, tail, len(prompt))
                kv.free(fork)
    last = feed(runner, rounded(slot), tail, len(prompt))
    yield "full", 1.0, one.bytes, last
    if not one.after:
        yield "", 1.0, one.bytes, torch.cat([first, last])


@torch.inference_mode()
def measure(
    results: Annotated[Path, typer.Argument(help="JSON lines, added to.")],
    model: Model = DEFAULT_MODEL,
    corpus: Annotated[list[str] | None, typer.Option(help="[default: documentation, mansfield-park]")] = None,
    windows: int = 6,
    length: Annotated[int, typer.Option(help="Tokens of a window, all of which layers attend to.")] = 512,
    decoded: Annotated[int, typer.Option(help="Of them predicted after an eviction.")] = 64,
    only: Annotated[list[str] | None, typer.Option(help="Contenders, all if not given.")] = None,
    evict: Annotated[bool, typer.Option(help="With a part of the cache too.")] = True,
) -> None:
    """Measures every contender on windows of text."""
    lab = Lab(model)
    done = {(r.corpus, r.window, r.contender) for r in read(results)} if results.exists() else set()
    chosen = [one for one in contenders(lab.config.head_dim) if not only or one.name in only]
    texts = [
        (name, i, ids)
        for i in range(windows)
        for name in corpus or ["documentation", "mansfield-park"]
        for ids in [token_windows(lab.tokenizer, load_corpus(name), length, windows)[i].tolist()]
    ]
    begin = lab.tokenizer.encode("").ids  # some models predict little without the token that texts begin with
    for name, i, window in tqdm(texts, disable=None):
        ids = (begin + window)[:length]
        runner = lab.runner(Contender("float32", "float32", 0), length)
        exact = feed(runner, runner.kv.add_sequence(), ids, 0)
        for one in chosen:
            if (name, i, one.name) in done:
                continue
            found = []
            for policy, share, size, logits in measure_window(
                lab, one, ids, decoded, POLICIES if evict else {}
            ):
                sums = compared(exact[-len(logits) :], logits, torch.tensor(ids[-len(logits) + 1 :]))
                found.append(Result(name, i, one.name, policy, share, size, len(logits) - 1, *sums))
            with results.open("a") as file:
                file.writelines(json.dumps(asdict(result)) + "\n" for result in found)


@dataclass(frozen=True)
class Demotion:
    """How what an eviction keeps is held.

    Attributes:
        name: In the table.
        keys, values: What rounds.
        top: Budget of the tokens of the highest scores, which stay in 8 bits; "" if none do.
    """

    name: str
    keys: Rounding
    values: Rounding
    top: str = ""


class Demoting(Evaluator):
    """Rounds what an eviction keeps, at the budgets that are for that.

    Args:
        engine: Whose cache is int8.
        source: What records name as their source.
        demotions: By the budget.
    """

    def __init__(self, engine: Engine, source: str, demotions: dict[str, Demotion]) -> None:
        super().__init__(engine, source)
        self._demotions = demotions

    def _branch(self, prompt: Any, variant: Variant, plan: EvictionPlan) -> Any:
        branch = super()._branch(prompt, variant, plan)
        if demotion := self._demotions.get(variant.budget):
            exempt: Choice = nothing
            if demotion.top:
                options = parse_variant(variant.policy, demotion.top).options
                view = self._runner.attention.view(prompt.slot)
                if plan.needs.repetition:
                    view = replace(view, repetition=self._repeated(prompt))
                top = resolve(options, prompt.tokens, self._kv.layout)
                exempt = kept_by(view, top, self._kv.kernels)
            compress(self._runner, branch.slot, demotion.keys, demotion.values, exempt)
        return branch


def percent(share: float) -> str:
    """A share as a budget."""
    return f"{100 * share:.4g}%"


@torch.inference_mode()
def demoted(
    results: Annotated[Path, typer.Argument(help="JSON lines, added to.")],
    model: Model = DEFAULT_MODEL,
    policy: str = "snapcur",
    protocol: ProtocolName = "visible",
    samples: Annotated[int, typer.Option(help="Texts of each kind.")] = 4,
) -> None:
    """Prints what is answered of what the int8 cache answers that keeps everything."""
    engine = build_engine(EngineOptions(model=model, weights="int8", kv_dtype="int8", prefix_cache_memory=0))
    dim, four = engine.kv.layout.head_dim, through(Int4())
    high, names, demotions = get_format("int8").token_bytes(dim) + SIDE_BYTES, {}, {}
    for share in SHARES[1:]:
        names[percent(share)] = "int8"
        for name, keys in (("k8v4", lambda x: x), ("int4", rotated(four))):
            more = share * high / (get_format(name).token_bytes(dim) + SIDE_BYTES)
            half = share / 2
            demotions[percent(more)] = Demotion(name, keys, four)
            demotions[percent(half + more / 2)] = Demotion(
                f"half int8, half {name}", keys, four, percent(half)
            )
    names |= {budget: demotion.name for budget, demotion in demotions.items()}
    seeds, kinds = range(10000, 10000 + samples), TASKS["questions"].corpora
    plan = Plan(["questions"], [1000], seeds, kinds, [protocol], cross([policy], names))
    evaluator = Demoting(engine, f"{model}, weights int8, KV int8", demotions)
    results.touch()
    with Journal.open(results) as journal:
        for job in tqdm(plan.jobs(evaluator.source, read_records(results)), disable=None):
            journal.append(evaluator.evaluate(job.recipe, job.wanted))
    found = [r for r in read_records(results) if r.nll is not None and r.policy == policy]
    cells = []
    for budget, name in names.items():
        of_budget = [r for r in found if r.budget == budget]
        right, nll = (
            sum(x) / len(of_budget) for x in zip(*((r.score, r.nll) for r in of_budget), strict=True)
        )
        cells.append([budget, name, f"{len(of_budget)}", f"{right:.1%}", f"{nll:.4f}"])
    print(table(["kept", "as", "questions", "answered", "NLL of the right answer"], cells))


def speed(
    model: Model = DEFAULT_MODEL,
    kv_dtype: Annotated[
        list[str] | None, typer.Option(help="The first is what others are held against. [float16, int8]")
    ] = None,
    requests: Annotated[int, typer.Option(help="At once.")] = 8,
    prompt: Annotated[int, typer.Option(help="Tokens of each.")] = 2000,
    new_tokens: int = 64,
    budget: Annotated[str | None, typer.Option(help="What snapcur keeps, if not everything.")] = None,
) -> None:
    """Prints how long steps take, those that compute prompts and those that only decode."""
    kv = parse_options({"policy": "full"} if budget is None else {"policy": "snapcur", "budget": budget})
    sampling = SamplingParams(new_tokens, temperature=0.0, ignore_eos=True)
    engines = {}
    for name in kv_dtype or ["float16", "int8"]:
        options = {"model": model, "kv_dtype": name, "kv_cache_memory": "2GiB", "prefix_cache_memory": 0}
        engine = engines[name] = build_engine(EngineOptions.model_validate(options))
        for i, ids in enumerate(token_spans(engine.info.tokenizer, requests, prompt, seed=0)):
            submit(engine, str(i), ids, sampling, kv)
    seconds = {name: {True: list[float](), False: list[float]()} for name in engines}
    while any(engine.has_work for engine in engines.values()):
        for name, engine in engines.items():
            started = time.perf_counter()
            engine.step()
            prefills = any(s.prefilling for s in engine.scheduler.running) or engine.scheduler.num_waiting > 0
            seconds[name][prefills].append(time.perf_counter() - started)
    first, *_ = engines
    cells = []
    for name, of_phases in seconds.items():
        row = [name]
        for phase, times in of_phases.items():
            ratio = statistics.median(
                own / other for own, other in zip(times, seconds[first][phase], strict=True)
            )
            row += [f"{1e3 * statistics.median(times):.2f}", f"{ratio:.3f}"]
        cells.append(row)
    print(table(["cache", "prompt step, ms", "ratio", "decode step, ms", "ratio"], cells))


@torch.inference_mode()
def entropy(
    model: Model = DEFAULT_MODEL, length: Annotated[int, typer.Option(help="Tokens.")] = 1024
) -> None:
    """Prints what DEFLATE makes of the pages of a text, bytes of like significance together."""
    lab = Lab(model)
    ids = token_windows(lab.tokenizer, load_corpus("documentation"), length, 1)[0].tolist()
    cells = []
    for name in BUILT:
        runner = lab.runner(Contender(name, name, 0), length)
        slot = runner.kv.add_sequence()
        feed(runner, slot, ids, 0)
        contents = runner.kv.contents(slot, length)
        arrays = copy_out(runner.kv, contents.table, contents.lengths).values()
        planes = [array.view(torch.uint8).view(-1, array.element_size()).T.contiguous() for array in arrays]
        started = time.process_time()
        packed = [zlib.compress(plane.numpy().tobytes(), 1) for plane in planes]
        written = time.process_time()
        for one in packed:
            zlib.decompress(one)
        read = time.process_time()
        size = sum(plane.nbytes for plane in planes)
        rates = (f"{size / 1e6 / seconds:.0f} MB/s" for seconds in (written - started, read - written))
        cells.append([name, f"{size / 1e6:.1f}", f"{sum(map(len, packed)) / size:.3f}", *rates])
    print(table(["format", "MB", "DEFLATE", "packed", "unpacked"], cells))


def compared(exact: Tensor, logits: Tensor, targets: Tensor) -> tuple[float, float, float, float]:
    """Sums of NLL, NLL of the exact ones, KL and agreement, a few rows at a time: vocabularies are large."""
    total = torch.zeros(4, dtype=torch.float64)
    for start in range(0, len(targets), 64):
        part = slice(start, min(start + 64, len(targets)))
        reference, found, target = exact[part], logits[part], targets[part]
        a = agreement(reference, found, target)
        parts = a.nll, token_nll(reference, target), a.kl, a.top1
        total += torch.stack([x.double().sum() for x in parts])
    nll, exact_nll, kl, top1 = total.tolist()
    return nll, exact_nll, kl, top1


def read(path: Path) -> list[Result]:
    """The lines of a file of results."""
    return [Result(**json.loads(line)) for line in path.read_text().splitlines()]


@dataclass(frozen=True)
class Row:
    """Means over the windows of a text, or of all."""

    contender: str
    policy: str
    share: float
    bytes: float
    ratio: float
    kl: float
    top1: float


def rows(results: list[Result]) -> list[Row]:
    """A row for each contender, policy and share."""
    groups: dict[tuple[str, str, float], list[Result]] = {}
    for result in results:
        groups.setdefault((result.contender, result.policy, result.share), []).append(result)
    found = []
    for (contender, policy, share), of in groups.items():
        tokens = sum(r.tokens for r in of)
        ratio = math.exp(sum(r.nll - r.exact_nll for r in of) / tokens)
        kl, top1 = (sum(getattr(r, name) for r in of) / tokens for name in ("kl", "top1"))
        found.append(Row(contender, policy, share, of[0].bytes, ratio, kl, top1))
    return found


def pareto(points: list[Row]) -> list[Row]:
    """Those than which no other has both fewer bytes and a smaller KL."""
    best: list[Row] = []
    for row in sorted(points, key=lambda row: (row.bytes, row.kl)):
        if not best or row.kl < best[-1].kl:
            best.append(row)
    return best


def report(
    results: Path,
    plot: Annotated[Path | None, typer.Option(help="Where to draw the frontier.")] = None,
) -> None:
    """Prints the tables, and draws bytes against KL."""
    found = read(results)
    texts = list(dict.fromkeys(r.corpus for r in found))
    full = {
        text: {r.contender: r for r in rows([x for x in found if x.corpus == text and not x.policy])}
        for text in texts
    }
    header = [
        "format",
        "bytes",
        *(f"{what}, {text}" for text in texts for what in ("perplexity ratio", "KL", "top-1")),
    ]
    cells = []
    for name, row in full[texts[0]].items():
        of_texts = [full[text][name] for text in texts if name in full[text]]
        numbers = [x for r in of_texts for x in (f"{r.ratio:.4f}", f"{r.kl:.4f}", f"{r.top1:.1%}")]
        cells.append([name, f"{row.bytes:.0f}", *numbers])
    print(table(header, cells), end="\n\n")
    tails = rows([r for r in found if r.policy])
    print(shares_table(tails))
    if plot is not None:
        draw(tails, plot)


def shares_table(tails: list[Row]) -> str:
    """KL of each format with all tokens, with each policy and share, and of int8's bytes spent otherwise."""
    of = {(r.contender, r.policy, r.share): r for r in tails}
    points = [(policy, share) for policy in POLICIES for share in SHARES]
    cells = []
    for full in sorted((r for r in tails if r.policy == "full"), key=lambda r: -r.bytes):
        kls = [f"{of[full.contender, *point].kl:.3f}" for point in points]
        cells.append([full.contender, f"{full.bytes:.0f}", f"{full.kl:.4f}", *kls])
    for mix in dict.fromkeys(r.policy.partition(", ")[2] for r in tails if "," in r.policy):
        kls = [f"{of['int8', f'{policy}, {mix}', share].kl:.3f}" for policy, share in points]
        cells.append([mix, "", "", *kls])
    return table(["format", "bytes", "all", *(f"{policy} {share:.3g}" for policy, share in points)], cells)


def draw(tails: list[Row], path: Path) -> None:
    """A panel per policy: KL over bytes, a line per format from the full cache down, and the frontier."""
    from matplotlib.figure import Figure

    full = [r for r in tails if r.policy == "full"]
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    for axis, policy in zip(figure.subplots(1, len(POLICIES), sharey=True), POLICIES, strict=True):
        of_policy = [r for r in tails if r.policy.split(",")[0] == policy]
        for name in dict.fromkeys(r.contender for r in full):
            whole = [r for r in full if r.contender == name]
            line = sorted(
                [*whole, *(r for r in of_policy if r.contender == name and r.policy == policy)],
                key=lambda r: r.bytes,
            )
            simulated = name not in BUILT
            axis.plot(
                [r.bytes for r in line],
                [r.kl for r in line],
                marker="x" if simulated else "o",
                ls=":" if simulated else "-",
                label=name,
            )
        mixed = [r for r in of_policy if r.policy != policy]
        axis.plot([r.bytes for r in mixed], [r.kl for r in mixed], "k*", label="8 and 4 bits by score")
        best = pareto([*full, *of_policy])
        axis.plot(
            [r.bytes for r in best], [r.kl for r in best], color="black", lw=4, alpha=0.15, label="Pareto"
        )
        axis.set(xscale="log", yscale="log", xlabel="bytes per token of the prompt and head", title=policy)
        ticks = (16, 32, 64, 128, 256)
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.xaxis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("KL to a float32 cache that keeps everything")
    figure.axes[-1].legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)


app = script(__doc__, measure, report, demoted, speed, entropy)

if __name__ == "__main__":
    app()
