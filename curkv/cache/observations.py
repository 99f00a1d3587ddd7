"""What policies need to know of a sequence's queries, gathered layer by layer while it is computed."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

STATISTICS_SKIP = 4
"""First tokens left out of query statistics: their hidden states are outliers (Expected Attention)."""

BLOCK_SKIP = 8
"""First tokens before the first block of non-causal attention: Compactor keeps them anyway."""


@dataclass(frozen=True)
class Needs:
    """What a policy reads besides the pages.

    Attributes:
        queries: Queries of that many last tokens.
        column_sums: The attention each token received from all queries, in `pages.attention`.
        query_statistics: Mean and covariance of all queries before RoPE.
        query_pairs: Mean of all queries before RoPE, and mean length of each pair of channels that it turns.
        block: Attention inside blocks of that many tokens, not causal; 0: none.
        repetition: The attention that tokens receive while the model repeats the text.
        chunk: Queries of the newest chunk, of two tokens or more, and their log-sum-exp.
    """

    queries: int = 0
    column_sums: bool = False
    query_statistics: bool = False
    query_pairs: bool = False
    block: int = 0
    repetition: bool = False
    chunk: bool = False

    def __or__(self, other: Needs) -> Needs:
        """What two policies need together; of two sizes of blocks the larger is taken."""
        return Needs(
            max(self.queries, other.queries),
            self.column_sums or other.column_sums,
            self.query_statistics or other.query_statistics,
            self.query_pairs or other.query_pairs,
            max(self.block, other.block),
            self.repetition or other.repetition,
            self.chunk or other.chunk,
        )

    @property
    def all_queries(self) -> bool:
        """Whether every query counts, so that none may be left out."""
        return self.column_sums or self.query_statistics or self.query_pairs or bool(self.block)

    @property
    def by_layer(self) -> bool:
        """Whether of a token that is generated more is read, in each layer, than its queries after RoPE."""
        return self.query_statistics or self.query_pairs or bool(self.block)

    @property
    def attention_scores(self) -> bool:
        """Whether the attention of single queries decides what is kept."""
        return self.queries > 0 or self.column_sums

    @property
    def query_agnostic(self) -> bool:
        """Whether keys and values alone decide what is kept."""
        return self == Needs()


@dataclass(frozen=True)
class QueryStatistics:
    """Sums over a layer's queries before RoPE, in float64.

    Attributes:
        count: Tokens.
        total: [Hq, head_dim], sum of the queries.
        outer: [Hq, head_dim, head_dim], sum of their outer products.
    """

    count: int
    total: Tensor
    outer: Tensor

    @classmethod
    def of(cls, q: Tensor) -> QueryStatistics:
        """Statistics of float32 [T, Hq, head_dim]; of the few tokens of a step, so that sums of floats do."""
        heads = q.transpose(0, 1)
        return cls(len(q), heads.sum(1).double(), (heads.transpose(1, 2) @ heads).double())

    def __add__(self, other: QueryStatistics) -> QueryStatistics:
        return QueryStatistics(self.count + other.count, self.total + other.total, self.outer + other.outer)

    @property
    def mean(self) -> Tensor:
        """float32 [Hq, head_dim]."""
        return (self.total / max(1, self.count)).float()

    @property
    def covariance(self) -> Tensor:
        """float32 [Hq, head_dim, head_dim]."""
        mean = self.total / max(1, self.count)
        return (self.outer / max(1, self.count) - mean[:, :, None] * mean[:, None]).float()


@dataclass(frozen=True)
class QueryPairs:
    """Sums over a layer's queries before RoPE, in float64.

    Attributes:
        count: Tokens.
        total: [Hq, head_dim], sum of the queries.
        lengths: [Hq, head_dim / 2], sum of the lengths of their pairs: RoPE turns a channel of the first half
            with the one half a head further.
    """

    count: int
    total: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, q: Tensor) -> QueryPairs:
        """Sums over float32 [T, Hq, head_dim]."""
        first, second = q.chunk(2, -1)
        return cls(len(q), q.sum(0).double(), torch.hypot(first, second).sum(0).double())

    def __add__(self, other: QueryPairs) -> QueryPairs:
        return QueryPairs(self.count + other.count, self.total + other.total, self.lengths + other.lengths)

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """The mean query [Hq, head_dim] and the mean lengths [Hq, head_dim / 2], float64."""
        return self.total / max(1, self.count), self.lengths / max(1, self.count)


@dataclass(frozen=True)
class BlockAttention:
    """The attention that a layer's tokens received inside their blocks.

    Attributes:
        block: Tokens of a block; the first one starts at position `BLOCK_SKIP`.
        sums: float32 [H, m], of the tokens of all complete blocks, mean over the group.
        queries: float32 [t, Hq, head_dim] of the block that is not complete, after RoPE.
        keys: float32 [t, H, head_dim] of the same tokens, after RoPE.
    """

    block: int
    sums: Tensor
    queries: Tensor
    keys: Tensor

    @classmethod
    def empty(cls, block: int, q: Tensor, k: Tensor) -> BlockAttention:
        """No tokens yet, for queries and keys shaped like these."""
        return cls(block, q.new_zeros(k.shape[1], 0, dtype=torch.float32), q[:0], k[:0])

    def extended(self, q: Tensor, k: Tensor) -> BlockAttention:
        """The same with further tokens."""
        queries, keys, sums = torch.cat([self.queries, q]), torch.cat([self.keys, k]), [self.sums]
        whole = len(queries) // self.block * self.block
        for start in range(0, whole, self.block):
            stop = start + self.block
            sums.append(_block_sums(queries[start:stop], keys[start:stop]))
        return BlockAttention(self.block, torch.cat(sums, 1), queries[whole:].clone(), keys[whole:].clone())

    def all_sums(self) -> Tensor:
        """float32 [H, m + t], with the last block as far as it is known."""
        if not len(self.queries):
            return self.sums
        return torch.cat([self.sums, _block_sums(self.queries, self.keys)], 1)


def _block_sums(q: Tensor, k: Tensor) -> Tensor:
    """What each key receives from all queries of its block, without a scale: float32 [H, t]."""
    tokens, heads, dim = k.shape
    group = q.shape[1] // heads
    queries = q.view(tokens, heads, group, dim).permute(1, 2, 0, 3)
    logits = queries.float() @ k.permute(1, 2, 0)[:, None].float()
    return logits.softmax(-1).sum(2).mean(1)


class Observations:
    """One sequence's queries, as far as its policy needs them.

    What is stored is replaced and never written to, so that forks share it.

    Attributes:
        needs: What is gathered.
        queries: By layer: float32 [up to w, Hq, head_dim], the last queries after RoPE, oldest first.
        steps: Behind these: [L, Hq, head_dim] each, those of single tokens, seen in all layers at once.
        statistics: By layer: of all queries before RoPE.
        pairs: By layer: of all queries before RoPE.
        blocks: By layer: attention inside blocks.
        chunk: By layer: the newest chunk's queries as attention took them, [T, Hq, head_dim], and the
            log-sum-exp of their scores, float32 [T, Hq].
    """

    def __init__(self, needs: Needs) -> None:
        self.needs = needs
        self.queries: dict[int, Tensor] = {}
        self.steps: tuple[Tensor, ...] = ()
        self.statistics: dict[int, QueryStatistics] = {}
        self.pairs: dict[int, QueryPairs] = {}
        self.blocks: dict[int, BlockAttention] = {}
        self.chunk: dict[int, tuple[Tensor, Tensor]] = {}

    def fork(self) -> Observations:
        """The same observations, to be continued apart."""
        fork = copy.copy(self)
        fork.queries, fork.blocks, fork.chunk = dict(self.queries), dict(self.blocks), dict(self.chunk)
        fork.statistics, fork.pairs = dict(self.statistics), dict(self.pairs)
        return fork

    def see_unrotated(self, layer: int, q: Tensor, start: int) -> None:
        """Takes new queries before RoPE, float32 [T, Hq, head_dim], the first at position `start`."""
        counted = q[max(0, STATISTICS_SKIP - start) :]
        if self.needs.query_statistics:
            new, old = QueryStatistics.of(counted), self.statistics.get(layer)
            self.statistics[layer] = new if old is None else old + new
        if self.needs.query_pairs:
            more, known = QueryPairs.of(counted), self.pairs.get(layer)
            self.pairs[layer] = more if known is None else known + more

    def see_rotated(self, layer: int, q: Tensor) -> None:
        """Takes a chunk's queries after RoPE, [T, Hq, head_dim]."""
        if window := self.needs.queries:
            self._sort_by_layer()
            old = self.queries.get(layer, q[:0])
            self.queries[layer] = torch.cat([old, q[-window:]])[-window:].clone()

    def see_block(self, layer: int, q: Tensor, k: Tensor, start: int) -> None:
        """Takes new queries and keys after RoPE, [T, Hq, head_dim] and [T, H, head_dim], as `needs.block`."""
        q, k = q[max(0, BLOCK_SKIP - start) :], k[max(0, BLOCK_SKIP - start) :]
        blocks = self.blocks.get(layer) or BlockAttention.empty(self.needs.block, q, k)
        self.blocks[layer] = blocks.extended(q, k)

    def see_step(self, q: Tensor) -> None:
        """Takes a single token's queries in all layers, after RoPE, [L, Hq, head_dim]."""
        if window := self.needs.queries:
            self.steps = (*self.steps, q)[-window:]

    def last_queries(self, count: int) -> Tensor:
        """Returns the last queries after RoPE, [L, up to count, Hq, head_dim], oldest first."""
        self._sort_by_layer()
        return torch.stack([self.queries[layer][-count:] for layer in range(len(self.queries))])

    def _sort_by_layer(self) -> None:
        """Puts what was seen in all layers at once behind what was seen layer by layer."""
        if self.steps:
            new, self.steps = torch.stack(self.steps, 1), ()
            if self.queries:
                new = torch.cat([self.last_queries(self.needs.queries), new], 1)
            self.queries = dict(enumerate(new[:, -self.needs.queries :]))

    def see_attended(self, layer: int, q: Tensor, lse: Tensor) -> None:
        """Takes a chunk's queries [T, Hq, head_dim] as attention took them, and their log-sum-exp [T, Hq]."""
        self.chunk[layer] = q.clone(), lse.clone()
