"""Where slots, tokens and starts become logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from curkv.cache.attention import PagedAttention
from curkv.cache.batch import Batch
from curkv.cache.page_manager import PageManager
from curkv.engine.replay import Replay
from curkv.models.decoder import Decoder


class Runner:
    """A model over a cache.

    Attributes:
        model: the model.
        attention: its attention, over the pages of `kv`.
        replay: runs steps that only decode, if given; it may be taken away.
    """

    def __init__(self, model: Decoder, attention: PagedAttention, replay: Replay | None = None) -> None:
        self.model = model
        self.attention = attention
        self.replay = replay

    @property
    def kv(self) -> PageManager:
        """The cache."""
        return self.attention.kv

    def run(
        self,
        slots: Sequence[int],
        tokens: Sequence[Sequence[int]],
        starts: Sequence[int],
        wanted: Sequence[int] | None = None,
    ) -> Tensor:
        """Takes pages for new tokens and computes them.

        Args:
            slots: [B], different sequences; those with a single new token first, to have them decoded fast.
            tokens: the new tokens of each, one or more.
            starts: [B], logical position of each sequence's first new token.
            wanted: [B], of how many of its last tokens each sequence wants logits; default 1.

        Returns:
            float32 [R, vocab_size], in the order of the sequences; a later run may overwrite it.

        Raises:
            OutOfPages: the pool is short; nothing is changed.
            ValueError: a slot is not in use or a head would exceed `max_tokens`; nothing is changed.
        """
        return self._forward(self._extend(slots, tokens, starts, wanted))

    def decode(self, slot: int, token: Tensor, position: int) -> Tensor:
        """Takes room for one token of one sequence that the host does not know, and computes it.

        Args:
            slot: the sequence.
            token: int64 [1], on the cache's device.
            position: its logical position.

        Returns:
            float32 [1, vocab_size]; a later run may overwrite it.

        Raises:
            OutOfPages: the pool is short; nothing is changed.
        """
        batch = self._extend([slot], [[0]], [position], None)
        return self._forward(replace(batch, token_ids=token))

    def run_with_states(
        self,
        slots: Sequence[int],
        tokens: Sequence[Sequence[int]],
        starts: Sequence[int],
        wanted: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The same, which tells the last hidden states of all new tokens besides: float32 [T, hidden]."""
        batch = self._extend(slots, tokens, starts, wanted)
        found = self.model.forward_with_states(batch, self.attention)
        self.attention.see_steps(batch.stepped, batch.seen)
        return found

    def _forward(self, batch: Batch) -> Tensor:
        """Computes a batch; if all are decodes of which nothing is to be seen layer by layer, as a replay."""
        by_layer = any(one.observations.needs.by_layer for one in batch.observed)
        if self.replay is not None and batch.only_decodes and not by_layer:
            return self.replay.forward(batch)
        logits = self.model.forward(batch, self.attention)
        self.attention.see_steps(batch.stepped, batch.seen)
        return logits

    def _extend(
        self,
        slots: Sequence[int],
        tokens: Sequence[Sequence[int]],
        starts: Sequence[int],
        wanted: Sequence[int] | None,
    ) -> Batch:
        """Takes pages for new tokens and makes a batch of them."""
        kv = self.attention.kv
        kv.extend(slots, [len(new) for new in tokens])
        return Batch.build(slots, tokens, starts, wanted, kv.device, kv.observed)
