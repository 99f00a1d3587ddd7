"""What one step of the engine runs, as flattened tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, takewhile

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segment:
    """Where one sequence's tokens are in a batch.

    Attributes:
        index: place of the sequence in the batch.
        slot: its cache slot.
        start: its first token.
        end: one past its last token.
        position: logical position of its first token.
    """

    index: int
    slot: int
    start: int
    end: int
    position: int


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
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    query_start: Tensor
    num_decodes: int
    logit_rows: Tensor

    @classmethod
    def build(
        cls,
        slots: Sequence[int],
        token_ids: Sequence[Sequence[int]],
        starts: Sequence[int],
        wanted: Sequence[int] | None = None,
        device: str | torch.device = "cpu",
    ) -> Batch:
        """Flattens per-sequence data; put sequences with a single new token first to have them decoded fast.

        Args:
            slots: the cache slot of each sequence.
            token_ids: the new tokens of each sequence, one or more.
            starts: logical position of each sequence's first new token.
            wanted: of how many of its last tokens each sequence wants logits; default 1.
            device: where the tensors go.

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
        pinned = torch.device(device).type != "cpu"

        def upload(values: Iterable[int], dtype: torch.dtype) -> Tensor:
            host = torch.tensor(list(values), dtype=dtype)
            return (host.pin_memory() if pinned else host).to(device, non_blocking=True)

        return cls(
            token_ids=upload(chain.from_iterable(token_ids), torch.int64),
            positions=upload(chain.from_iterable(positions), torch.int32),
            slots=upload(slots, torch.int32),
            query_start=upload([0, *ends], torch.int32),
            num_decodes=sum(1 for _ in takewhile(lambda count: count == 1, counts)),
            logit_rows=upload(rows, torch.int64),
        )

    @cached_property
    def decode_slots(self) -> Tensor:
        """int32 [num_decodes], slots of the sequences that use decode attention."""
        return self.slots[: self.num_decodes]

    @cached_property
    def prefill_slots(self) -> Tensor:
        """int32 [B - num_decodes], slots of the other sequences."""
        return self.slots[self.num_decodes :]

    @cached_property
    def prefill_query_start(self) -> Tensor:
        """int32 [B - num_decodes + 1], `query_start` of the others, from their first token."""
        return self.query_start[self.num_decodes :] - self.num_decodes

    @cached_property
    def segments(self) -> list[Segment]:
        """The sequences, on the host."""
        starts = self.query_start.tolist()
        positions = self.positions[self.query_start[:-1].long()].tolist()
        places = zip(self.slots.tolist(), starts, starts[1:], positions, strict=False)
        return [Segment(index, *place) for index, place in enumerate(places)]
