"""Speed of each kernel beside what the machine can do: reading memory in order, multiplying matrices.

Every round runs all cases in turn and each case keeps its best time, so that ratios hold on a noisy machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from curkv.kernels.dispatch import Kernels, get_kernels
from curkv.kernels.formats import KV_FORMATS, get_format
from curkv.kernels.linear.formats import WEIGHT_FORMATS, WeightFormat
from curkv.kernels.pages import Pages, allocate
from curkv.tables import columns

HEAD_DIM, HEADS, GROUP = 64, 3, 3  # of smollm2-135m
PAGE_SIZE = 64
LAYERS = 6  # different pages in turn, more than the caches hold
CONTEXTS = tuple(range(2000, 4001, 280))  # tokens of the eight sequences of a decode step
CHUNK = 512
MODEL_LAYERS, HIDDEN, INTERMEDIATE, VOCABULARY = 30, 576, 1536, 49152
LINEAR = (  # [out, in] of a layer: qkv, o, gate and up, down
    ((HEADS * GROUP + 2 * HEADS) * HEAD_DIM, HIDDEN),
    (HIDDEN, HEADS * GROUP * HEAD_DIM),
    (2 * INTERMEDIATE, HIDDEN),
    (HIDDEN, INTERMEDIATE),
)
LONG = 8 * (4000,)
WEIGHTS = list(WEIGHT_FORMATS.values())
READ, MATMUL = "streaming read", "matmul"


@dataclass(frozen=True)
class Case:
    """Something to measure.

    Attributes:
        kernel: What runs.
        shape: In words.
        dtype: Of the cache, of the weights, or of what is read.
        run: Runs it `calls` times.
        calls: Kernel calls of one run.
        bytes: Memory that one call has to move.
        flops: Multiplications and additions of one call; 0 where they do not matter.
    """

    kernel: str
    shape: str
    dtype: str
    run: Callable[[], object]
    calls: int = 1
    bytes: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Timing:
    """The best time of one call of a case."""

    case: Case
    seconds: float

    @property
    def bandwidth(self) -> float:
        """Bytes per second."""
        return self.case.bytes / self.seconds

    @property
    def flops(self) -> float:
        """Floating point operations per second."""
        return self.case.flops / self.seconds


@dataclass(frozen=True)
class Layers:
    """Sequences of random tokens on shuffled pages of one pool.

    Attributes:
        pages: The pool.
        tables: int32 [sequences, layers, H, max_pages].
        lengths: int32 [sequences, layers, H].
        slots: int32 [sequences].
    """

    pages: Pages
    tables: Tensor
    lengths: Tensor
    slots: Tensor

    @property
    def tokens(self) -> int:
        """Tokens of one layer, over all sequences and heads."""
        return int(self.lengths[:, 0].sum())

    @property
    def token_bytes(self) -> int:
        """Bytes of one head's K and V of one token, scales included."""
        stores = self.pages.k, self.pages.v
        return sum(store.format.token_bytes(store.head_dim) for store in stores)

    def layer(self, layer: int) -> tuple[Pages, Tensor, Tensor, Tensor]:
        """What the attention kernels take."""
        return self.pages, self.tables[:, layer], self.lengths[:, layer], self.slots


def make_layers(contexts: tuple[int, ...], layers: int, kv_dtype: str) -> Layers:
    """Fill a pool with sequences of `contexts` tokens, each head a few tokens longer than the one before."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor(contexts)[:, None, None] + 7 * torch.arange(HEADS)
    lengths = lengths.expand(-1, layers, -1).to(torch.int32).contiguous()
    counts = -(-lengths // PAGE_SIZE)
    owned = torch.arange(int(counts.max())) < counts[..., None]
    tables = torch.zeros(owned.shape, dtype=torch.int32)
    num_pages = int(counts.sum())
    tables[owned] = torch.randperm(num_pages, generator=generator).to(torch.int32)
    pages = allocate(get_format(kv_dtype), num_pages, PAGE_SIZE, HEAD_DIM)
    some = torch.randn(64, PAGE_SIZE, HEAD_DIM, generator=generator)
    for store in (pages.k, pages.v):
        store.write(some[torch.arange(num_pages) % len(some)])
    for side in (pages.k_sq, pages.v_sq, pages.attention):
        side.uniform_(generator=generator)
    pages.position.zero_()
    return Layers(pages, tables, lengths, torch.arange(len(contexts), dtype=torch.int32))


def limits() -> Iterator[Case]:
    """What the machine can do: reading 256 MiB in order, a float32 matrix product."""
    memory = torch.ones(64 << 20)
    yield Case(READ, "256 MiB", "float32", memory.sum, bytes=memory.nbytes)
    n = 1024
    a, b = torch.rand(n, n), torch.rand(n, n)
    yield Case(MATMUL, f"{n}^3", "float32", lambda: a @ b, flops=2 * n**3)


def linear(kernels: Kernels, weights: WeightFormat) -> Iterator[Case]:
    """All linear layers of the model, for one token, eight, and a chunk of one prompt."""
    layers = [
        kernels.pack_linear(torch.randn(shape), None, weights)
        for _ in range(MODEL_LAYERS)
        for shape in LINEAR
    ]
    head = kernels.pack_linear(torch.randn(VOCABULARY, HIDDEN), None, weights.of_head)
    count = MODEL_LAYERS * sum(rows * columns for rows, columns in LINEAR)
    for tokens, sampled in ((1, 1), (8, 8), (CHUNK, 1)):
        inputs = MODEL_LAYERS * [torch.randn(tokens, columns) for _, columns in LINEAR]
        last = torch.randn(sampled, HIDDEN)

        def run(inputs: list[Tensor] = inputs, last: Tensor = last) -> None:
            for layer, x in zip(layers, inputs, strict=True):
                layer(x)
            head(last)

        read = head.nbytes + sum(layer.nbytes for layer in layers)
        flops = 2 * (tokens * count + sampled * VOCABULARY * HIDDEN)
        yield Case("linear, the whole model", f"{tokens} tokens", weights.name, run, bytes=read, flops=flops)


def decode(kernels: Kernels, kv_dtype: str) -> Iterator[Case]:
    """One token for each of eight sequences of 2,000 to 4,000 tokens, of eight of 4,000, and of one."""
    for contexts in (CONTEXTS, LONG, LONG[:1]):
        cache = make_layers(contexts, LAYERS if len(contexts) > 1 else LAYERS * len(LONG), kv_dtype)
        q = torch.randn(len(contexts), HEADS * GROUP, HEAD_DIM)
        layers = cache.tables.shape[1]

        def run(cache: Layers = cache, q: Tensor = q, layers: int = layers) -> None:
            for layer in range(layers):
                kernels.paged_decode_attention(q, *cache.layer(layer), HEAD_DIM**-0.5)

        lengths = "-".join(f"{n:,}" for n in sorted({contexts[0], contexts[-1]}))
        shape = f"{len(contexts)} x {lengths} tokens"
        yield Case("paged_decode_attention", shape, kv_dtype, run, layers, cache.tokens * cache.token_bytes)


def prefill(kernels: Kernels, kv_dtype: str) -> Iterator[Case]:
    """A chunk of a prompt after nothing, and after earlier chunks; torch's attention on the same shape."""
    for before in (0, 2000, 4000):
        cache = make_layers((before + CHUNK,), 1, kv_dtype)
        cache.lengths.fill_(before + CHUNK)
        q = torch.randn(CHUNK, HEADS * GROUP, HEAD_DIM)
        starts = torch.tensor([0, CHUNK], dtype=torch.int32)

        def run(q: Tensor, cache: Layers = cache, starts: Tensor = starts) -> None:
            kernels.paged_prefill_attention(q, *cache.layer(0), starts, HEAD_DIM**-0.5)

        pairs = HEADS * GROUP * CHUNK * (before + (CHUNK + 1) / 2)
        flops = int(4 * HEAD_DIM * pairs)
        shape = f"{CHUNK} after {before:,} tokens"
        bytes_read = cache.tokens * cache.token_bytes
        for name, queries in (("", q), (", bfloat16 queries", q.bfloat16())):
            attend = partial(run, queries)
            yield Case(
                f"paged_prefill_attention{name}", shape, kv_dtype, attend, bytes=bytes_read, flops=flops
            )
        if kv_dtype == "float32":
            queries = q.transpose(0, 1)[None].contiguous()
            keys = torch.randn(1, HEADS * GROUP, before + CHUNK, HEAD_DIM)
            mask = torch.ones(CHUNK, before + CHUNK, dtype=torch.bool).tril(before)

            def run_torch(queries: Tensor = queries, keys: Tensor = keys, mask: Tensor = mask) -> None:
                functional.scaled_dot_product_attention(queries, keys, keys, attn_mask=mask)

            yield Case("(torch attention)", shape, kv_dtype, run_torch, bytes=bytes_read, flops=flops)


def store(kernels: Kernels, kv_dtype: str) -> Iterator[Case]:
    """Rotating queries, and rotating and storing keys and values: one prompt chunk, one decode step."""
    angles = torch.rand(CHUNK, HEAD_DIM // 2)
    cos, sin = angles.cos(), angles.sin()
    for new_tokens in ((CHUNK,), (1,) * len(CONTEXTS)):
        tokens, layers = sum(new_tokens), 30
        cache = make_layers(tuple(CHUNK for _ in new_tokens), layers, kv_dtype)
        q = torch.randn(tokens, HEADS * GROUP, HEAD_DIM)
        k, v = torch.randn(2, tokens, HEADS, HEAD_DIM)
        positions = torch.zeros(tokens, dtype=torch.int32)
        starts = torch.tensor([0, *new_tokens]).cumsum(0).to(torch.int32)

        def rotate(q: Tensor = q, positions: Tensor = positions, layers: int = layers) -> None:
            for _ in range(layers):
                kernels.rope(q, cos, sin, positions)

        def run(
            cache: Layers = cache,
            k: Tensor = k,
            v: Tensor = v,
            positions: Tensor = positions,
            starts: Tensor = starts,
        ) -> None:
            for layer in range(cache.tables.shape[1]):
                pages, table, lengths, slots = cache.layer(layer)
                kernels.store_kv(pages, k, v, cos, sin, positions, table, lengths, slots, starts)

        shape = f"{tokens} tokens"
        if kv_dtype == "float32":
            yield Case("rope", shape, kv_dtype, rotate, layers, 2 * q.nbytes)
        written = tokens * HEADS * (cache.token_bytes + 16)
        yield Case("store_kv", shape, kv_dtype, run, layers, k.nbytes + v.nbytes + written)


def evict(kernels: Kernels, kv_dtype: str) -> Iterator[Case]:
    """Scoring 30 layers of a 4,000-token prompt, choosing a quarter of each head, moving it to the front."""
    layers, length = 30, CONTEXTS[-1]
    cache = make_layers((length,), layers, kv_dtype)
    cache.lengths.fill_(length)
    tables, lengths = cache.tables[0].flatten(0, 1), cache.lengths[0].flatten()
    shape, tokens = f"{layers} x {HEADS} x {length:,} tokens", layers * HEADS * length
    keep = torch.full((layers, HEADS), length // 4, dtype=torch.int32)
    scores = torch.rand(layers, HEADS, length)
    indices, counts = kernels.select(scores, cache.lengths[0], keep)
    rows = indices.flatten(0, 1), counts.flatten()
    if kv_dtype == "float32":
        score = lambda: kernels.leverage_scores(cache.pages, tables, lengths)  # noqa: E731
        yield Case("leverage_scores", shape, kv_dtype, score, bytes=12 * tokens)
        choose = lambda: kernels.select(scores, cache.lengths[0], keep)  # noqa: E731
        yield Case("select", shape, kv_dtype, choose, bytes=4 * tokens)
    move = lambda: kernels.compact(cache.pages, tables, tables, *rows)  # noqa: E731
    yield Case(
        "compact",
        f"a quarter of {shape}",
        kv_dtype,
        move,
        bytes=2 * int(counts.sum()) * (cache.token_bytes + 16),
    )


def run(rounds: int = 15) -> list[Timing]:
    """Measure all kernels of the CPU, and the machine's limits, in turn.

    Args:
        rounds: Runs of each case; the best one counts.
    """
    kernels = get_kernels("cpu")
    cases = [*limits(), *(case for weights in WEIGHTS for case in linear(kernels, weights))]
    stored = [name for name in KV_FORMATS if "cpu" in get_format(name).devices]
    for make in (decode, prefill, store, evict):
        cases += [case for kv_dtype in stored for case in make(kernels, kv_dtype)]
    best = [float("inf")] * len(cases)
    for _ in range(rounds + 1):  # the first run of each compiles and warms up
        for i, case in enumerate(cases):
            start = time.perf_counter()
            case.run()
            best[i] = min(best[i], (time.perf_counter() - start) / case.calls)
    return [Timing(case, seconds) for case, seconds in zip(cases, best, strict=True)]


def table(timings: list[Timing]) -> str:
    """Lay the results out: times, and rates as shares of what the machine reads and multiplies."""
    read = max(m.bandwidth for m in timings if m.case.kernel == READ)
    matmul = max(m.flops for m in timings if m.case.kernel == MATMUL)
    header = ("kernel", "shape", "dtype", "ms", "MB", "GB/s", "of read", "GFLOP/s", "of matmul")
    rows = []
    for timing in timings:
        case, moved, computed = timing.case, ("", "", ""), ("", "")
        if case.bytes:
            bandwidth = timing.bandwidth
            moved = (f"{case.bytes / 1e6:.2f}", f"{bandwidth / 1e9:.1f}", f"{bandwidth / read:.0%}")
        if case.flops:
            computed = (f"{timing.flops / 1e9:.1f}", f"{timing.flops / matmul:.0%}")
        rows.append((case.kernel, case.shape, case.dtype, f"{timing.seconds * 1e3:.3f}", *moved, *computed))
    return columns(header, rows, texts=3)
