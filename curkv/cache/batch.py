"""What one step of the engine runs, as flattened tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, chain, takewhile

import torch
from torch import Tensor

from curkv.cache.observations import Observations
from curkv.cache.upload import upload_list

LONG_CHUNK = 256
"""Fewest tokens of a chunk for which a launch of its own is worth it."""


@dataclass(frozen=True, slots=True)
class Begun:
    """A sequence of a batch whose text begins with a long chunk: there is nothing before that to attend to.

    Attributes:
        index: place of the sequence in the batch.
        start: its first token.
        end: one past its last token.
    """

    index: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Observed:
    """A sequence of a batch whose queries are observed, and where its tokens are.

    Attributes:
        observations: what is gathered of its queries.
        slot: the sequence's slot in the cache.
        index: place of the sequence in the batch.
        start: its first token.
        end: one past its last token.
        position: logical position of its first token.
    """

    observations: Observations
    slot: int
    index: int
    start: int
    end: int
    position: int

    @property
    def column_sums(self) -> bool:
        """Whether the attention that its tokens receive is summed up."""
        return self.observations.needs.column_sums

    @property
    def chunk(self) -> bool:
        """Whether its chunk's queries are kept as attention takes them."""
        return self.observations.needs.chunk


@dataclass(frozen=True)
class Seen:
    """The queries of single tokens, which the attention puts here.

    Attributes:
        rows: int64 [num_decodes], these tokens.
        layers: by layer that policies evict from: [num_decodes, Hq, head_dim], after RoPE.
    """

    rows: Tensor
    layers: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """The new tokens of every sequence in a step, sequence after sequence.

    Attributes:
        token_ids: int64 [T].
        positions: int32 [T], logical positions; after an eviction they differ from the place in the cache.
        slots: int32 [B], the cache slot of each sequence.
        query_start: int32 [B + 1], sequence b owns tokens query_start[b] to query_start[b + 1].
        num_decodes: the first `num_decodes` sequences have exactly one token and use decode attention.
        logit_rows: int64 [R], the tokens whose logits are wanted.
        observed: sequences whose queries are observed, in their order.
        begun: sequences whose texts begin with long chunks, in their order.
        seen: the queries of single tokens, if any are wanted.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    query_start: Tensor
    num_decodes: int
    logit_rows: Tensor
    observed: tuple[Observed, ...] = ()
    begun: tuple[Begun, ...] = ()
    seen: Seen | None = None

    @classmethod
    def build(
        cls,
        slots: Sequence[int],
        token_ids: Sequence[Sequence[int]],
        starts: Sequence[int],
        wanted: Sequence[int] | None = None,
        device: str | torch.device = "cpu",
        observed: Mapping[int, Observations] | None = None,
    ) -> Batch:
        """Flattens per-sequence data; put sequences with a single new token first to have them decoded fast.

        Args:
            slots: the cache slot of each sequence.
            token_ids: the new tokens of each sequence, one or more.
            starts: logical position of each sequence's first new token.
            wanted: of how many of its last tokens each sequence wants logits; default 1.
            device: where the tensors go.
            observed: by slot, what is gathered of a sequence's queries.

        Returns:
            The batch; `logit_rows` follows the order of the sequences.
        """
        counts = [len(tokens) for tokens in token_ids]
        if not all(counts):
            raise ValueError("every sequence of a batch needs at least one new token")
        ends = list(accumulate(counts))
        positions = [range(start, start + count) for start, count in zip(starts, counts, strict=True)]
        wanted = [1] * len(ends) if wanted is None else wanted
        rows = chain.from_iterable(range(end - n, end) for end, n in zip(ends, wanted, strict=True))

        def upload(values: Iterable[int], dtype: torch.dtype) -> Tensor:
            return upload_list(values, torch.device(device), dtype)

        batch = cls(
            token_ids=upload(chain.from_iterable(token_ids), torch.int64),
            positions=upload(chain.from_iterable(positions), torch.int32),
            slots=upload(slots, torch.int32),
            query_start=upload([0, *ends], torch.int32),
            num_decodes=sum(1 for _ in takewhile(lambda count: count == 1, counts)),
            logit_rows=upload(rows, torch.int64),
            observed=tuple(
                Observed(observed[slot], slot, index, ends[index] - counts[index], ends[index], starts[index])
                for index, slot in enumerate(slots)
                if slot in observed
            )
            if observed
            else (),
            begun=tuple(
                Begun(index, ends[index] - counts[index], ends[index])
                for index, start in enumerate(starts)
                if not start and counts[index] >= LONG_CHUNK
            ),
        )
        if not batch.stepped:
            return batch
        return replace(batch, seen=Seen(torch.arange(batch.num_decodes, device=device)))

    @property
    def only_decodes(self) -> bool:
        """Whether every sequence has exactly one token."""
        return self.num_decodes == len(self.slots)

    @cached_property
    def stepped(self) -> tuple[Observed, ...]:
        """Sequences with a single token of which queries, or what these attend to, are wanted."""
        decodes = (one for one in self.observed if one.index < self.num_decodes)
        return tuple(one for one in decodes if one.column_sums or one.observations.needs.queries)

    @cached_property
    def decode_slots(self) -> Tensor:
        """int32 [num_decodes], slots of the sequences that use decode attention."""
        return self.slots[: self.num_decodes]

    @cached_property
    def prefill_slots(self) -> Tensor:
        """int32 [B - num_decodes], slots of the other sequences."""
        return self.slots[self.num_decodes :]

    @cached_property
    def continued_slots(self) -> Tensor:
        """int32 [B - num_decodes], those slots, and -1 for sequences that have begun."""
        slots = self.prefill_slots.clone()
        for one in self.begun:
            slots.narrow(0, one.index - self.num_decodes, 1).fill_(-1)
        return slots

    @cached_property
    def prefill_query_start(self) -> Tensor:
        """int32 [B - num_decodes + 1], `query_start` of the others, from their first token."""
        return self.query_start[self.num_decodes :] - self.num_decodes
