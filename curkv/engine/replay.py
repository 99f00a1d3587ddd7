"""Decode steps that are made once and run again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import torch
from torch import Tensor

from curkv.cache.attention import PagedAttention
from curkv.cache.batch import Batch, Seen
from curkv.models.decoder import Decoder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MadeStep:
    """A step that can be run again.

    Attributes:
        run: runs it, over the memory that it was made with.
        logits: where its logits then are.
    """

    run: Callable[[], None]
    logits: Tensor


class Maker(Protocol):
    """Makes a step whose tensors never move into one call.

    Attributes:
        name: of what it makes, for the log.
        ahead: whether steps are made before there are any requests.
    """

    name: str
    ahead: bool

    def size(self, count: int, most: int) -> int:
        """Sequences of the step that `count` of at most `most` are run in; the others are none."""

    def make(self, step: Callable[[], Tensor]) -> MadeStep:
        """Makes a step; unless that is done ahead, it has been run once.

        Raises:
            RuntimeError: it cannot be made; it has to be run anew.
        """


class Replay:
    """Runs steps in which every sequence has one new token.

    The batch is copied into buffers that never move, and filled up to a size that the maker makes with rows
    of no sequence (slot -1), which kernels neither store nor attend for. Page table, lengths and pages are
    the cache's own tensors and never move either. So all that changes from step to step is in place before
    the step starts.

    Sequences whose queries are observed run in steps that keep the queries of all layers; what their policies
    want of these is taken afterwards.

    What cannot be made is run kernel by kernel, over the same buffers.

    Args:
        model: the model.
        attention: its attention.
        maker: makes the steps.
    """

    def __init__(self, model: Decoder, attention: PagedAttention, maker: Maker):
        self._model, self._attention, self._maker = model, attention, maker
        device, self._most = attention.kv.device, attention.kv.layout.max_sequences
        self._token_ids = torch.zeros(self._most, dtype=torch.int64, device=device)
        self._positions = torch.zeros(self._most, dtype=torch.int32, device=device)
        self._slots = torch.full((self._most,), -1, dtype=torch.int32, device=device)
        self._rows = torch.arange(self._most + 1, dtype=torch.int32, device=device)
        self._batches: dict[tuple[int, bool], Batch] = {}
        self._made: dict[tuple[int, bool], MadeStep] = {}
        self._can_make = True

    def prepare(self) -> None:
        """Makes every step that can be made ahead, largest first, so that the others use its memory again.

        All rows are of no sequence meanwhile, so nothing in the cache changes.
        """
        if self._maker.ahead:
            self._slots.fill_(-1)
            sizes = {self._maker.size(count, self._most) for count in range(1, self._most + 1)}
            for size, observed in product(sorted(sizes, reverse=True), (True, False)):
                if self._can_make:
                    self._make(size, observed)

    def forward(self, batch: Batch) -> Tensor:
        """Runs a step of decodes only.

        Args:
            batch: B sequences with one token each, of those observed nothing is wanted but their queries.

        Returns:
            float32 [R, vocab_size], logits of `batch.logit_rows`; overwritten by the next step.
        """
        count = batch.num_decodes
        size = self._maker.size(count, self._most)
        self._token_ids[:count].copy_(batch.token_ids)
        self._positions[:count].copy_(batch.positions)
        self._slots[:count].copy_(batch.slots)
        if count < size:
            self._slots[count:size].fill_(-1)
            self._positions[count:size].fill_(0)
        observed = batch.seen is not None
        logits = self._run(size, observed)
        self._attention.see_steps(batch.stepped, self._batch(size, observed).seen)
        return logits if len(batch.logit_rows) == size else logits.index_select(0, batch.logit_rows)

    def _run(self, size: int, observed: bool) -> Tensor:
        made = self._made.get((size, observed))
        if made is not None:
            made.run()
            return made.logits
        if self._can_make and not self._maker.ahead:
            made = self._make(size, observed)
        if made is not None:
            return made.logits
        return self._model.forward(self._batch(size, observed), self._attention)

    def _make(self, size: int, observed: bool) -> MadeStep | None:
        batch, key = self._batch(size, observed), (size, observed)
        try:
            self._made[key] = self._maker.make(lambda: self._model.forward(batch, self._attention))
        except RuntimeError as error:
            self._can_make = False
            self._made.clear()
            logger.warning("decode runs without %s, kernel by kernel: %s", self._maker.name, error)
        return self._made.get(key)

    def _batch(self, size: int, observed: bool) -> Batch:
        """The first rows of the buffers; the same tensors every time."""
        key = size, observed
        if key not in self._batches:
            self._batches[key] = Batch(
                token_ids=self._token_ids[:size],
                positions=self._positions[:size],
                slots=self._slots[:size],
                query_start=self._rows[: size + 1],
                num_decodes=size,
                logit_rows=self._rows[:size].long(),
                seen=Seen(self._rows[:size].long()) if observed else None,
            )
        return self._batches[key]
