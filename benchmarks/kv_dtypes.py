"""What formats of the KV cache cost in quality, with the full cache and with a part of it, at how many bytes.

    python benchmarks/kv_dtypes.py measure results.jsonl [--windows 6] [--length 1024] [--decoded 128]
    python benchmarks/kv_dtypes.py report results.jsonl [--plot frontier.png]

A window of text is computed in chunks of 512 over a cache of each format, all but the tokens at its end, that
are then predicted with the full cache and with what each policy keeps at each share. What has no kernels is
simulated: its numbers are rounded as it would round them, over a float32 cache. Everything is held against a
float32 cache that keeps all tokens. `measure` adds what `results.jsonl` does not have yet.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from tqdm import tqdm

from curkv.bench.script import Model, script
from curkv.cache.attention import PagedAttention
from curkv.cache.eviction import select
from curkv.cache.layout import CacheLayout, full_attention
from curkv.cache.page_manager import PageManager
from curkv.cache.parsing import parse_options, settle
from curkv.cache.plan import EvictionPlan, resolve
from curkv.engine.runner import Runner
from curkv.evaluation.corpora import load_corpus
from curkv.evaluation.perplexity import agreement, token_nll, token_windows
from curkv.kernels.dispatch import Kernels, get_kernels
from curkv.kernels.formats import KV_FORMATS, get_format
from curkv.kernels.formats.base import VectorFormat
from curkv.kernels.formats.int4 import Int4
from curkv.kernels.formats.int8 import Int8
from curkv.kernels.pages import SIDE_BYTES, Pages
from curkv.models.decoder import Decoder
from curkv.models.loading import load_config, load_tokenizer, resolve_model
from curkv.models.loading.built_in import DEFAULT_MODEL
from curkv.models.loading.checkpoint import Checkpoint
from curkv.models.rope import rope_tables
from curkv.tables import table

CHUNK = 512
POLICIES: dict[str, dict[str, Any]] = {
    "snapcur": {"policy": "snapcur"},
    "compactor": {"policy": "compactor", "allocation": "adaptive"},
}
SHARES = (0.5, 0.25, 0.125)
MIXES = (0.0, 0.25, 0.5)
"""Of a mixed cache's bytes, what tokens of 8 bits take."""

Rounding = Callable[[Tensor], Tensor]
"""Rounds new keys, or values, of a chunk: float32 [tokens, heads, head_dim] to the same."""


@dataclass(frozen=True)
class Contender:
    """A way to hold keys and values.

    Attributes:
        name: In tables.
        format: Of the cache that it is run over.
        bytes: Of a token in a head, side arrays included.
        keys, values: What a simulated one rounds with.
        evicts: Whether it is measured with a part of the cache too.
    """

    name: str
    format: str
    bytes: float
    keys: Rounding | None = None
    values: Rounding | None = None
    evicts: bool = True


@dataclass(frozen=True)
class Result:
    """A contender on a window of text: sums over its tokens.

    Attributes:
        corpus, window, contender: What.
        policy, share: What was kept of the prompt; "" and 1 for everything.
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


def sparse(share: float) -> Rounding:
    """Mustafar (2505.22913): the largest magnitudes of each vector as float16; the newest tokens too."""

    def rounded(x: Tensor) -> Tensor:
        count = round(share * x.shape[-1])
        least = x.abs().topk(count, -1).values[..., -1:]
        return torch.where(x.abs() >= least, x, 0.0).half().float()

    return rounded


def gear(rank: int, outliers: float, rounding: Rounding) -> Rounding:
    """GEAR (2403.05527): outliers apart, the rest rounded, and what that loses as a product of low rank.

    Of chunks of more than 64 tokens; others are as they are, as in its buffer.
    """

    def rounded(x: Tensor) -> Tensor:
        if len(x) <= 64:
            return x.half().float()
        count = max(1, round(outliers * x.shape[-1] / 2))
        extreme = torch.zeros_like(x, dtype=torch.bool)
        for largest in (False, True):
            extreme.scatter_(-1, x.topk(count, -1, largest=largest).indices, True)
        rest = torch.where(extreme, x.mean(-1, keepdim=True), x)
        base = rounding(rest)
        u, s, v = torch.linalg.svd((rest - base).transpose(0, 1), full_matrices=False)
        residual = (u[..., :rank] * s[..., None, :rank]).half().float() @ v[..., :rank, :].half().float()
        return torch.where(extreme, x.half().float(), base + residual.transpose(0, 1))

    return rounded


def contenders(head_dim: int) -> list[Contender]:
    """Every format, then what is simulated."""
    real = [Contender(n, n, get_format(n).token_bytes(head_dim) + SIDE_BYTES) for n in KV_FORMATS]
    int4, int8 = through(Int4()), through(Int8())
    four, eight = (f.token_bytes(head_dim) for f in (Int4(), Int8()))

    def sparse_bytes(share: float) -> float:
        """A bitmap, and float16 values padded to eights."""
        return head_dim / 8 + 2 * (-(-round(share * head_dim) // 8) * 8)

    def simulated(
        name: str, keys: Rounding, values: Rounding, vectors: float, evicts: bool = False
    ) -> Contender:
        return Contender(name, "float32", vectors + SIDE_BYTES, keys, values, evicts)

    low_rank = 2 * 4 * (1 + head_dim / CHUNK) + 3 * 2 * max(1, round(0.02 * head_dim / 2))
    return [
        *(one for one in real if one.name != "float32"),
        simulated("int4, keys rotated", rotated(int4), int4, 2 * four, True),
        simulated("int4, both rotated", rotated(int4), rotated(int4), 2 * four),
        simulated("k8v4, values rotated", int8, rotated(int4), eight + four),
        simulated("k4v8, keys rotated", rotated(int4), int8, eight + four),
        simulated("Mustafar 50 %", sparse(0.5), sparse(0.5), 2 * sparse_bytes(0.5)),
        simulated("Mustafar 70 %", sparse(0.3), sparse(0.3), 2 * sparse_bytes(0.3)),
        simulated("int8 keys, Mustafar 50 % values", int8, sparse(0.5), eight + sparse_bytes(0.5)),
        simulated("GEAR 4 bits", gear(4, 0.02, int4), gear(4, 0.02, int4), 2 * (four + low_rank)),
        simulated("int8 keys, GEAR values", int8, gear(4, 0.02, int4), eight + four + low_rank),
    ]  # fmt: skip


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
        """An empty cache that holds a few sequences of so many tokens."""
        config = self.config
        layers = full_attention(config.num_layers, config.num_kv_heads)
        layout = CacheLayout(layers, config.head_dim, 64, get_format(one.format), 4, config.max_positions)
        kv = PageManager(layout, 4 * layout.sequence_pages(tokens), rounding_kernels(self.kernels, one))
        return Runner(self.model, PagedAttention(kv, self.rope))


def rounding_kernels(kernels: Kernels, one: Contender) -> Kernels:
    """Kernels that round new keys, after RoPE, and values."""
    if one.keys is None or one.values is None:
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
    ) -> None:
        k = k.clone(memory_format=torch.contiguous_format)
        kernels.rope(k, cos, sin, positions)
        k = round_keys(k)
        kernels.rope(k, cos, -sin, positions)
        where = positions, table, lengths, slots, query_start
        kernels.store_kv(pages, k, round_values(v), cos, sin, *where)

    return replace(kernels, store_kv=store_kv)


def feed(runner: Runner, slot: int, ids: list[int], start: int) -> Tensor:
    """Computes tokens in chunks; the logits of all of them."""
    rows = [
        runner.run([slot], [ids[i : i + CHUNK]], [start + i], [len(ids[i : i + CHUNK])]).clone()
        for i in range(0, len(ids), CHUNK)
    ]
    return torch.cat(rows)


def demote(runner: Runner, slot: int, best: Tensor) -> None:
    """Rounds the tokens of a sequence whose positions are not among the best [L, H, n] to 4 bits."""
    view, four = runner.attention.view(slot), through(Int4())
    keys_four = rotated(four)
    for layer in range(view.num_layers):
        position = view.position[layer]
        kept = (position[..., None] == best[layer][:, None]).any(-1)[..., None]
        k, v = view.keys(layer), view.values(layer)
        runner.kv.overwrite(slot, layer, torch.where(kept, k, keys_four(k)), torch.where(kept, v, four(v)))


def kept_positions(runner: Runner, slot: int, plan: EvictionPlan) -> Tensor:
    """Positions [L, H, n] of what a plan keeps, -1 where there are fewer."""
    view = runner.attention.view(slot)
    indices, _ = select(view, plan, runner.kv.kernels)
    return view.position.gather(-1, indices.long().clamp_min(0)).where(indices >= 0, -1)


def measure_window(
    lab: Lab, one: Contender, ids: list[int], decoded: int, exact: Tensor
) -> Iterator[tuple[str, float, float, Tensor, Tensor]]:
    """Policy, share, bytes per token of the prompt and head, logits and where they begin.

    `exact` are the logits of a float32 cache, float32 [n, vocab].
    """
    runner, kv = (found := lab.runner(one, len(ids))), found.kv
    prompt, tail = ids[:-decoded], ids[-decoded:]
    needs = None
    for options in POLICIES.values():
        more = settle(parse_options({**options, "budget": "50%"})).policy.needs
        needs = more if needs is None else needs | more
    slot = kv.add_sequence(needs)
    first = feed(runner, slot, prompt, 0)
    whole = kv.fork(slot, observe=False)
    yield "", 1.0, one.bytes, torch.cat([first, feed(runner, whole, tail, len(prompt))]), exact
    kv.free(whole)
    after = exact[len(prompt) :]
    if not one.evicts:
        return

    def planned(options: dict[str, Any], share: float) -> EvictionPlan:
        budget = parse_options({**options, "budget": f"{100 * share:.6g}%"})
        return resolve(budget, range(len(prompt)), kv.layout)

    def evicted(options: dict[str, Any], share: float) -> int:
        fork = kv.fork(slot, observe=False)
        plan = planned(options, share)
        kv.evict(fork, *select(runner.attention.view(slot), plan, kv.kernels))
        return fork

    for policy, options in POLICIES.items():
        for share in SHARES:
            fork = evicted(options, share)
            yield policy, share, share * one.bytes, feed(runner, fork, tail, len(prompt)), after
            kv.free(fork)
            if one.name != "int8":
                continue
            low = 2 * Int4().token_bytes(lab.config.head_dim) + SIDE_BYTES
            for mix in MIXES:  # as many bytes as int8 at this share
                high_share = mix * share
                low_share = (1 - mix) * share * one.bytes / low
                fork = evicted(options, min(1.0, high_share + low_share))
                best = torch.full((len(kv.layout.evicted_rows), kv.layout.num_kv_heads, 1), -1)
                if mix:
                    best = kept_positions(runner, slot, planned(options, high_share))
                demote(runner, fork, best)
                logits = feed(runner, fork, tail, len(prompt))
                yield f"{policy}, {mix:.0%} of the bytes in 8 bits", share, share * one.bytes, logits, after
                kv.free(fork)


@torch.inference_mode()
def measure(
    results: Annotated[Path, typer.Argument(help="JSON lines, added to.")],
    model: Model = DEFAULT_MODEL,
    corpus: Annotated[list[str] | None, typer.Option(help="[default: documentation, mansfield-park]")] = None,
    windows: int = 6,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 1024,
    decoded: Annotated[int, typer.Option(help="Of them predicted after an eviction.")] = 128,
    only: Annotated[list[str] | None, typer.Option(help="Contenders, all if not given.")] = None,
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
    for name, i, ids in tqdm(texts, disable=None):
        runner = lab.runner(Contender("float32", "float32", 0), length)
        exact = feed(runner, runner.kv.add_sequence(), ids, 0)
        for one in chosen:
            if (name, i, one.name) in done:
                continue
            found = []
            for policy, share, size, logits, reference in measure_window(lab, one, ids, decoded, exact):
                targets = torch.tensor(ids[-len(reference) + 1 :])
                a = agreement(reference[:-1], logits[:-1], targets)
                sums = (
                    float(x.double().sum()) for x in (a.nll, token_nll(reference[:-1], targets), a.kl, a.top1)
                )
                found.append(Result(name, i, one.name, policy, share, size, len(targets), *sums))
            with results.open("a") as file:
                file.writelines(json.dumps(asdict(result)) + "\n" for result in found)


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
    cells = [
        [
            r.contender,
            r.policy,
            f"{r.share:.3g}",
            f"{r.bytes:.0f}",
            f"{r.ratio:.4f}",
            f"{r.kl:.4f}",
            f"{r.top1:.1%}",
        ]
        for r in sorted(tails, key=lambda r: (r.policy.split(",")[0], -r.bytes, r.kl))
    ]
    print(table(["format", "policy", "kept", "bytes", "perplexity ratio", "KL", "top-1"], cells))
    if plot is not None:
        draw(rows([r for r in found if not r.policy]), tails, plot)


def draw(full: list[Row], tails: list[Row], path: Path) -> None:
    """A panel per policy: KL over bytes, a line per format from the full cache down, and the frontier."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    for axis, policy in zip(figure.subplots(1, len(POLICIES), sharey=True), POLICIES, strict=True):
        of_policy = [r for r in tails if r.policy.split(",")[0] == policy]
        for name in dict.fromkeys(r.contender for r in full):
            whole = [r for r in full if r.contender == name]
            line = sorted(
                [*whole, *(r for r in of_policy if r.contender == name and r.policy == policy)],
                key=lambda r: r.bytes,
            )
            simulated = name not in KV_FORMATS
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


app = script(__doc__, measure, report)

if __name__ == "__main__":
    app()
