"""What steps must move and compute on a GPU, and what sizes of steps follow from that; needs none.

    python benchmarks/gpu/model.py

Prints four tables for Llama-3.1-8B on an H100: bytes of a decode step by formats; a prompt by the size of its
chunks; a question behind a long text by how its few tiles are shared; what planning a step ahead would save.
Rates are what such cards were seen to reach (a copy 3.0 TB/s, a bfloat16 product of large matrices 798
TFLOP/s); all else is counted. Nothing here is a measured time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from curkv.bench.script import script
from curkv.cache.batch import LONG_CHUNK
from curkv.kernels.formats import get_format
from curkv.kernels.paged_prefill_attention.triton import num_splits
from curkv.kernels.spec import MODELS
from curkv.tables import head, line

MODEL = MODELS[1]
VOCABULARY = 128_256
BANDWIDTH, FLOPS = 3.0e12, 798e12
"""Bytes and bfloat16 operations per second."""
PROCESSORS = 132
TILE = 128, 256
"""Rows and columns of a product that one processor computes at a time, as the vendor's kernels do."""
PAGED_SHARE, DENSE_SHARE = 0.38, 0.75
"""Of the peak, for attention of prompts: by Triton over pages, by the vendor's kernel over dense rows."""
LAUNCHES, LAUNCH = 10, 12e-6
"""Launches of a layer in a chunk; seconds that the host takes for one, Python included."""
WEIGHTS = {"bfloat16": 2.0, "fp8": 1.0}
"""Bytes of a weight in a layer."""
GAP = {8: 0.51e-3, 32: 0.84e-3, 64: 1.30e-3}
"""Seconds of the host between two decode steps, by sequences: Python on a Zen, and CUDA's calls."""


def layer_products() -> list[tuple[int, int]]:
    """Rows and columns of a layer's weights."""
    m = MODEL
    heads = (m.query_heads + 2 * m.kv_heads) * m.head_dim
    queries = m.query_heads * m.head_dim
    return [
        (heads, m.hidden), (m.hidden, queries), (2 * m.intermediate, m.hidden), (m.hidden, m.intermediate)
    ]  # fmt: skip


@dataclass(frozen=True)
class Decode:
    """A step of sequences that get a token each.

    Attributes:
        batch: sequences.
        tokens: held by each head of each.
        weights: format of the layers' weights; the head is bfloat16.
        kv_dtype: format of the cache.
    """

    batch: int
    tokens: int
    weights: str = "bfloat16"
    kv_dtype: str = "bfloat16"

    @property
    def weight_bytes(self) -> float:
        """Of all weights that are read."""
        layers = MODEL.layers * sum(rows * columns for rows, columns in layer_products())
        return layers * WEIGHTS[self.weights] + 2 * VOCABULARY * MODEL.hidden

    @property
    def kv_bytes(self) -> float:
        """Of all keys and values that are read."""
        token = MODEL.layers * MODEL.kv_heads * get_format(self.kv_dtype).token_bytes(MODEL.head_dim)
        return self.batch * self.tokens * token

    @property
    def floor(self) -> float:
        """Seconds that reading takes."""
        return (self.weight_bytes + self.kv_bytes) / BANDWIDTH


def product_seconds(tokens: int) -> float:
    """Seconds of a layer's products: whole rounds of tiles on all processors, or reading the weights."""
    total = 0.0
    for rows, columns in layer_products():
        tiles = ceil(tokens / TILE[0]) * ceil(rows / TILE[1])
        round_seconds = 2 * TILE[0] * TILE[1] * columns * PROCESSORS / FLOPS
        total += max(ceil(tiles / PROCESSORS) * round_seconds, 2 * rows * columns / BANDWIDTH)
    return total


def chunk_seconds(tokens: int, before: int, dense: bool) -> float:
    """Seconds of a chunk of a prompt behind so many tokens: of the GPU, or of the host's launches."""
    pairs = tokens * before + tokens * tokens / 2
    share = DENSE_SHARE if dense and not before and tokens >= LONG_CHUNK else PAGED_SHARE
    attention = 4 * MODEL.query_heads * MODEL.head_dim * pairs / (share * FLOPS)
    return MODEL.layers * max(product_seconds(tokens) + attention, LAUNCHES * LAUNCH)


def prompt_seconds(prompt: int, chunk: int, dense: bool = True) -> tuple[float, float]:
    """Seconds of a prompt, and of its longest step, which decodes beside it wait for."""
    steps = [chunk_seconds(min(chunk, prompt - before), before, dense) for before in range(0, prompt, chunk)]
    return sum(steps), max(steps)


def question_programs(tokens: int, rows: int = 128) -> tuple[int, int]:
    """Programs of attention for a question, one for each tile and head, and as many as share them now."""
    tile = rows // (MODEL.query_heads // MODEL.kv_heads)
    tiles = (tokens // tile + 1) * MODEL.kv_heads
    return tiles, tiles * num_splits(tiles, PROCESSORS)


def decode_rows() -> Iterator[list[object]]:
    """Bytes of decode steps with contexts of 8,192 tokens, by what is kept and in what."""
    ways = [
        ("all, bfloat16", 8192, "bfloat16", "bfloat16"),
        ("all, fp8 cache", 8192, "bfloat16", "fp8"),
        ("all, fp8 weights and cache", 8192, "fp8", "fp8"),
        ("25 %, bfloat16", 2048, "bfloat16", "bfloat16"),
        ("25 %, int8 cache", 2048, "bfloat16", "int8"),
        ("25 %, fp8 weights, int8 cache", 2048, "fp8", "int8"),
        ("25 %, fp8 weights and cache", 2048, "fp8", "fp8"),
    ]
    for name, tokens, weights, kv_dtype in ways:
        steps = [Decode(batch, tokens, weights, kv_dtype) for batch in GAP]
        cells = [f"{step.weight_bytes / 1e9:.1f} + {step.kv_bytes / 1e9:.1f}" for step in steps]
        yield [name, *cells, *(f"{step.floor * 1e3:.1f}" for step in steps)]


def chunk_rows() -> Iterator[list[object]]:
    """A prompt of 8,192 tokens by the size of its chunks."""
    for chunk in (256, 512, 1024, 2048, 4096, 8192):
        (paged, longest), (dense, _) = (prompt_seconds(8192, chunk, dense) for dense in (False, True))
        yield [f"{chunk:,}", *(f"{seconds * 1e3:.0f}" for seconds in (paged, dense, longest))]


def question_rows() -> Iterator[list[object]]:
    """Programs that attend for a question, and the share of the processors that have one."""
    for tokens in (16, 64, 128, 512, 2048):
        alone, shared = question_programs(tokens)
        yield [tokens, alone, shared, *(f"{min(1, n / PROCESSORS):.2f}" for n in (alone, shared))]


def gap_rows() -> Iterator[list[object]]:
    """What it would save if the host had the next step ready when one ends."""
    for batch, gap in GAP.items():
        steps = [Decode(batch, 8192), Decode(batch, 2048), Decode(batch, 2048, "fp8", "fp8")]
        shares = [gap / (step.floor / 0.75 + gap) for step in steps]
        yield [batch, f"{gap * 1e3:.2f}", *(f"{share:.0%}" for share in shares)]


def main() -> None:
    """Prints the tables."""
    batches = list(GAP)
    tables: list[tuple[list[str], Iterator[list[object]]]] = [
        (
            ["kept of 8,192", *(f"GB at {n}" for n in batches), *(f"ms at {n}" for n in batches)],
            decode_rows(),
        ),
        (["chunk", "ms, paged", "ms, first chunk dense", "longest step"], chunk_rows()),
        (["tokens", "programs before", "now", "processors busy before", "now"], question_rows()),
        (["sequences", "gap, ms", "of a step, all kept", "25 %", "25 %, fp8"], gap_rows()),
    ]
    for header, rows in tables:
        print(head(header))
        for cells in rows:
            print(line(cells))
        print()


app = script(__doc__, main)

if __name__ == "__main__":
    app()
