"""What an operation is besides its code: inputs for it, and what a call of it costs.

Each operation's `spec.py` has the signature of an implementation and its `CASES`; `dispatch.cases` gives all.
Tests, the compiler ahead of time and the benchmark on GPUs take their inputs from there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from curkv.kernels.costs import Cost
from curkv.kernels.formats import get_format
from curkv.kernels.pages import Pages, allocate

Phase = Literal["decode", "prefill", "evict"]
"""When an operation runs: a token for each sequence, a chunk of one prompt, an eviction from one sequence."""


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a model that reach the kernels, from its `config.json`."""

    name: str
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int


MODELS = (
    ModelShape("SmolLM2-135M", 30, 9, 3, 64, 576, 1536),
    ModelShape("Llama-3.1-8B", 32, 32, 8, 128, 4096, 14336),
    ModelShape("Qwen3-8B", 36, 32, 8, 128, 4096, 12288),
    ModelShape("Mistral-7B", 32, 32, 8, 128, 4096, 14336),
)


@dataclass(frozen=True)
class Workload:
    """How much an operation is given.

    Attributes:
        model: Whose layers it is called for.
        sequences: Decoded together.
        tokens: Stored in each head of each sequence.
        chunk: New tokens of a prompt, the last ones of those stored.
        kept: Tokens of a head that an eviction keeps.
        window: Queries that score the stored tokens.
        rank: Columns of a sketch.
        page_size: Tokens per page.
        kv_dtype: Name of the cache's format.
        dtype: Of activations.
    """

    model: ModelShape
    sequences: int
    tokens: int
    chunk: int = 1
    kept: int = 1
    window: int = 32
    rank: int = 20
    page_size: int = 64
    kv_dtype: str = "bfloat16"
    dtype: torch.dtype = torch.bfloat16

    def letters(self, phase: Phase) -> dict[str, float]:
        """What the letters in the formulas of `costs` stand for, but for S; s and e are means of K and V."""
        m = self.model
        stored = get_format(self.kv_dtype)
        sizes = [[x.nbytes for x in v.arrays(m.head_dim).values()] for v in (stored.keys, stored.values)]
        sequences, new = {"decode": (self.sequences, 1), "prefill": (1, self.chunk), "evict": (1, 0)}[phase]
        return {
            "B": sequences, "T": sequences * new, "c": new, "n": self.tokens, "k": self.kept,
            "L": m.layers, "H": m.kv_heads, "Q": m.query_heads, "G": m.query_heads // m.kv_heads,
            "D": m.head_dim, "P": self.page_size, "w": self.window, "r": self.rank, "d": m.hidden,
            "I": m.intermediate, "s": sum(first for first, *_ in sizes) / (2 * m.head_dim),
            "e": sum(sum(others) for _, *others in sizes) / 2, "a": self.dtype.itemsize,
        }  # fmt: skip


SOFTCAP = 50.0
"""Of attention scores, as Gemma 2 has it."""


@dataclass
class Inputs:
    """Tensors for a workload.

    Attributes:
        workload: How much of each.
        device: Where they lie.
        stand_in: Whether only dtypes, shapes and strides matter: nothing is filled, there is a single page.
        layers: Layers with different pages, to take in turn.
        layer: The one whose pages are taken, may be changed.
    """

    workload: Workload
    device: str = "cpu"
    stand_in: bool = False
    layers: int = 2
    layer: int = 0

    @cached_property
    def memory(self) -> tuple[Pages, Tensor]:
        """Pages, and a table int32 [sequences, layers, H, max_pages] of shuffled ones.

        There are as many sequences as an eviction has layers, if that are more.
        """
        w, m = self.workload, self.workload.model
        per_head = -(-w.tokens // w.page_size)
        shape = max(w.sequences, m.layers), self.layers, m.kv_heads, per_head
        if self.stand_in:
            return _pages(w, 1, self.device, True), torch.zeros(shape, dtype=torch.int32, device=self.device)
        table = torch.randperm(torch.Size(shape).numel(), device=self.device).to(torch.int32).view(shape)
        pages = _pages(w, table.numel(), self.device, False)
        places = torch.arange(per_head * w.page_size, dtype=torch.int32, device=self.device)
        pages.position[table.long()] = places.view(per_head, -1)
        return pages, table

    @property
    def pages(self) -> Pages:
        """The pages of all layers."""
        return self.memory[0]

    @property
    def scale(self) -> float:
        """What scores are multiplied with."""
        return float(self.workload.model.head_dim**-0.5)

    def attended(self, sequences: int) -> tuple[Tensor, Tensor, Tensor]:
        """What attention takes of a layer: its table and lengths, strided, and the slots of sequences."""
        table = self.memory[1][:, self.layer]
        lengths = torch.full(
            (len(table), self.layers, table.shape[1]),
            self.workload.tokens, dtype=torch.int32, device=self.device,
        )[:, self.layer]  # fmt: skip
        return table, lengths, self.integers(sequences)

    def masks(self) -> dict[str, Any]:
        """What else attention may be told: a window that leaves out an eighth of the tokens, a cap, sinks."""
        m, n = self.workload.model, self.workload.tokens
        return {"window": n - n // 8, "softcap": SOFTCAP, "sinks": self.near(1.0, m.query_heads)}

    def rows(self) -> tuple[Tensor, Tensor]:
        """What an eviction takes: table and lengths of all heads of all layers of one sequence."""
        table = self.memory[1][: self.workload.model.layers, self.layer].flatten(0, 1)
        return table, torch.full((len(table),), self.workload.tokens, dtype=torch.int32, device=self.device)

    def new_tokens(self) -> tuple[Tensor, Tensor]:
        """Positions of a chunk's tokens, and where each sequence's begin and end."""
        w = self.workload
        ends = torch.tensor([0, w.chunk], dtype=torch.int32, device=self.device)
        return self.integers(w.tokens)[w.tokens - w.chunk :].clone(), ends

    def qkv(self, tokens: int) -> tuple[Tensor, ...]:
        """Queries, keys and values of new tokens, as one product of a linear layer is split."""
        m = self.workload.model
        heads = [m.query_heads, m.kv_heads, m.kv_heads]
        return torch.split(self.normal(tokens, sum(heads), m.head_dim), heads, dim=1)

    def angles(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines of all positions."""
        shape = 2, self.workload.tokens, self.workload.model.head_dim // 2
        cos, sin = self.uniform(*shape)
        return cos, sin

    def integers(self, count: int) -> Tensor:
        """int32 [count], ascending."""
        return torch.arange(count, dtype=torch.int32, device=self.device)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normally distributed, of the activations' dtype unless another is given."""
        if self.stand_in:
            return torch.empty(shape, dtype=dtype or self.workload.dtype, device=self.device)
        return torch.randn(shape, device=self.device).to(dtype or self.workload.dtype)

    def near(self, value: float, *shape: int) -> Tensor:
        """float32, within a half of a value."""
        return value + self.uniform(*shape) - 0.5

    def uniform(self, *shape: int) -> Tensor:
        """float32 from 0 to 1."""
        if self.stand_in:
            return torch.zeros(shape, device=self.device)
        return torch.rand(shape, device=self.device)


@dataclass(frozen=True)
class Call:
    """Arguments of an operation.

    Attributes:
        arguments: In order.
        keywords: By name.
        written: Those of its inputs that it writes.
    """

    arguments: tuple[Any, ...]
    keywords: dict[str, Any] = field(default_factory=dict)
    written: tuple[Tensor, ...] = ()

    def run(self, operation: Callable[..., Any]) -> list[Tensor]:
        """Calls an implementation; returns what it gives and what it wrote."""
        out = operation(*self.arguments, **self.keywords)
        returned = () if out is None else (out,) if isinstance(out, Tensor) else out
        return [*returned, *self.written]


@dataclass(frozen=True)
class Case:
    """A way in which an operation is called.

    Attributes:
        label: What tells it from the operation's other ones; "" for the usual one.
        phase: When it is called so.
        cost: Of a call.
        call: Makes the arguments.
        reads_vectors: Whether it reads or writes keys or values, so that the cache's dtype matters.
        writes_fp8: Whether it is for devices that have 8-bit floats.
    """

    label: str
    phase: Phase
    cost: Cost
    call: Callable[[Inputs], Call]
    reads_vectors: bool = False
    writes_fp8: bool = False


def _pages(w: Workload, count: int, device: str, stand_in: bool) -> Pages:
    """Pages, of random tokens at position 0 unless nothing is to be filled."""
    pages = allocate(get_format(w.kv_dtype), count, w.page_size, w.model.head_dim, device)
    if not stand_in:
        for store in (pages.k, pages.v):
            store.write(torch.randn(count, w.page_size, w.model.head_dim, device=device))
        for side in (pages.k_sq, pages.v_sq, pages.attention):
            side.uniform_()
        pages.position.zero_()
    return pages
