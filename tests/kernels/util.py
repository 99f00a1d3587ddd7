"""Random page pools and tolerances shared by the kernel tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from curkv.kernels.formats import KV_FORMATS, get_format
from curkv.kernels.formats.base import KVFormat
from curkv.kernels.pages import SIDES, Pages, allocate

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CPU_FORMATS = tuple(name for name in KV_FORMATS if "cpu" in get_format(name).devices)
"""Formats that the CPU's kernels read and write."""
UNMIXED = tuple(name for name in CPU_FORMATS if get_format(name).keys == get_format(name).values)
"""Formats whose keys and values lie alike: a mixture reads each like one of these."""


@dataclass(frozen=True)
class Pool:
    """A page pool and one layer's view of its tables.

    Attributes:
        pages: The memory; whatever holds no token is NaN (integers: 77, position: -1).
        table: int32 [max_sequences, H, max_pages], strided as a layer's slice is; unused entries are -1.
        lengths: int32 [max_sequences, H]; rows of no sequence are 0.
        slots: int32 [B], the row of each sequence.
    """

    pages: Pages
    table: Tensor
    lengths: Tensor
    slots: Tensor

    def copy(self) -> Pool:
        """Copy the memory that kernels write, so that two of them can be compared."""
        return replace(self, pages=map_arrays(self.pages, Tensor.clone))


def map_arrays(pages: Pages, function: Callable[[Tensor], Tensor]) -> Pages:
    """Pages of what a function makes of each array."""
    k, v = (
        replace(store, arrays={name: function(x) for name, x in store.arrays.items()})
        for store in (pages.k, pages.v)
    )
    return Pages(k, v, **{name: function(getattr(pages, name)) for name in SIDES})


def generator(seed: int) -> torch.Generator:
    """Draws for tensors on the default device."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def rows_of(pool: Pool) -> tuple[Tensor, Tensor]:
    """Table [N, max_pages] and lengths [N] of all heads of all sequences, one a row."""
    slots = pool.slots.long()
    return pool.table[slots].flatten(0, 1), pool.lengths[slots].flatten()


def fitting(head_dim: int, kv_dtype: str) -> int:
    """The least number of channels from `head_dim` on that vectors of a format may have."""
    multiple = get_format(kv_dtype).multiple
    return -(-head_dim // multiple) * multiple


def make_pool(
    lengths: Sequence[Sequence[int]],
    *,
    head_dim: int = 64,
    page_size: int = 16,
    kv_dtype: str | KVFormat = "float32",
    new_tokens: Sequence[int] | None = None,
    shared_pages: int = 0,
    seed: int = 0,
) -> Pool:
    """Fill a pool with random tokens on shuffled pages.

    Args:
        lengths: [B][H], tokens of each head.
        head_dim: Size of a head.
        page_size: Tokens per page.
        kv_dtype: The format of K and V, or its name.
        new_tokens: [B], last tokens of each head that are not filled in: their pages exist, `store_kv` writes
            them.
        shared_pages: The first that many pages of each head of sequence 0 also belong to all other sequences
            (as far as these and sequence 0 have full pages).
        seed: Of the random numbers.
    """
    with torch.device("cpu"):
        drawn = _draw_pool(lengths, head_dim, page_size, kv_dtype, new_tokens, shared_pages, seed)
    device = torch.get_default_device()
    return replace(
        drawn,
        pages=map_arrays(drawn.pages, lambda array: array.to(device)),
        table=_moved_slice(drawn.table, device),
        lengths=_moved_slice(drawn.lengths, device),
        slots=drawn.slots.to(device),
    )


def _moved_slice(layer: Tensor, device: torch.device) -> Tensor:
    """A layer's slice of a tensor on another device, with the strides that it has here."""
    assert layer._base is not None
    return layer._base.to(device)[:, 1]


def _draw_pool(
    lengths: Sequence[Sequence[int]],
    head_dim: int,
    page_size: int,
    kv_dtype: str | KVFormat,
    new_tokens: Sequence[int] | None,
    shared_pages: int,
    seed: int,
) -> Pool:
    """`make_pool` on the CPU: equal on every device."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor(lengths, dtype=torch.int32)
    batch, heads = counts.shape
    max_pages = int(-(-counts.max() // page_size)) + 1
    num_pages = int((-(-counts // page_size)).sum()) + 5
    free = torch.randperm(num_pages, generator=generator).tolist()
    format = get_format(kv_dtype) if isinstance(kv_dtype, str) else kv_dtype
    pages = allocate(format, num_pages, page_size, head_dim)
    for array in pages.arrays.values():
        array.fill_(torch.nan if array.is_floating_point() else 77)
    pages.position.fill_(-1)
    max_sequences = batch + 2
    table = torch.full((max_sequences, 2, heads, max_pages), -1, dtype=torch.int32)[:, 1]
    slots = torch.randperm(max_sequences, generator=generator)[:batch].to(torch.int32)
    all_lengths = torch.zeros(max_sequences, 2, heads, dtype=torch.int32)[:, 1]
    all_lengths[slots.long()] = counts
    first = int(slots[0]) if batch else 0
    for i, slot in enumerate(slots.tolist()):
        for head in range(heads):
            length = int(counts[i, head])
            filled = length - (new_tokens[i] if new_tokens else 0)
            for page in range(-(-length // page_size)):
                full = (page + 1) * page_size <= min(filled, int(counts[0, head]))
                if i > 0 and page < shared_pages and full:
                    table[slot, head, page] = table[first, head, page]
                    continue
                number = table[slot, head, page] = free.pop()
                _fill_page(pages, number, page, filled, generator)
    return Pool(pages, table, all_lengths, slots)


def _fill_page(pages: Pages, number: int, page: int, filled: int, generator: torch.Generator) -> None:
    """Put the tokens `page * page_size ...` of a head, as far as there are `filled`, into page `number`."""
    page_size, head_dim = pages.page_size, pages.head_dim
    n = max(0, min(page_size, filled - page * page_size))
    k, v = torch.randn(2, n, head_dim, generator=generator)
    tokens = torch.full((n,), number), torch.arange(n)
    pages.k.write(k, *tokens)
    pages.v.write(v, *tokens)
    pages.position[number, :n] = torch.arange(page * page_size, page * page_size + n, dtype=torch.int32)
    pages.k_sq[number, :n] = k.square().sum(-1)
    pages.v_sq[number, :n] = v.square().sum(-1)
    pages.attention[number, :n] = 0


def scatter_positions(pool: Pool, new_tokens: Sequence[int], seed: int = 0) -> Pool:
    """A copy of a pool whose heads have lost different tokens: positions have gaps, but for new tokens."""
    pool, draw = pool.copy(), torch.Generator().manual_seed(seed)
    page_size, newest = pool.pages.page_size, 3 * int(pool.lengths.max())
    table, lengths, position = pool.table.cpu(), pool.lengths.tolist(), pool.pages.position
    with torch.device("cpu"):
        for slot, new in zip(pool.slots.tolist(), new_tokens, strict=True):
            for row, length in zip(table[slot], lengths[slot], strict=True):
                old = torch.randperm(newest - new + 1, generator=draw)[: length - new].sort().values
                found = torch.cat([old, torch.arange(newest - new + 1, newest + 1)])[:length]
                index = torch.arange(length)
                position[row[index // page_size].long(), index % page_size] = found.int().to(position.device)
    return pool


MASKS: tuple[dict[str, float], ...] = (
    {"window": 1},
    {"window": 7},
    {"window": 16},
    {"window": 100},
    {"window": 5000},
    {"softcap": 2.0},
    {"sinks": 1.0},
    {"window": 70, "softcap": 3.0, "sinks": -1.0},
    {"sinks": 20.0},
)
"""What attention is told: windows smaller than a page of 16, as large, larger, larger than any text; a cap;
sinks around a number."""


def mask_arguments(mask: dict[str, float], query_heads: int) -> dict[str, Any]:
    """Keywords of attention, where sinks are numbers around the given one."""
    arguments: dict[str, Any] = dict(mask)
    if "sinks" in mask:
        arguments["sinks"] = mask["sinks"] + torch.linspace(-1, 1, query_heads)
    return arguments


def query_start(new_tokens: Sequence[int]) -> Tensor:
    """Cumulative counts int32 [B + 1] of [B] counts."""
    return torch.tensor([0, *new_tokens]).cumsum(0).to(torch.int32)


def rope_tables(head_dim: int, max_positions: int = 4096) -> tuple[Tensor, Tensor]:
    """Cosines and sines float32 [max_positions, head_dim / 2] of a Llama-like rotary embedding."""
    frequencies = 10_000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.arange(max_positions)[:, None] * frequencies
    return angles.cos(), angles.sin()


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of the expected values."""
    difference, expected = actual.double() - expected.double(), expected.double()
    return float(difference.square().mean().sqrt() / expected.square().mean().sqrt().clamp_min(1e-30))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Assert equal shapes, NaNs and infinities, and a relative RMS error of the rest up to `tolerance`."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert torch.equal(actual.isnan(), expected.isnan()), "NaN where there should be none, or the reverse"
    assert torch.equal(actual.isinf(), expected.isinf())
    actual, expected = (x.masked_fill(expected.isinf(), 0) for x in (actual, expected))
    if actual.numel():
        error = relative_rms(actual.nan_to_num(), expected.nan_to_num())
        assert error <= tolerance, f"relative RMS error {error:.2e} > {tolerance:.0e}"
