"""Decode steps on a CPU, recorded once per batch size and run again as one call."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from curkv.cache.attention import PagedAttention
from curkv.cache.batch import Batch
from curkv.kernels.cpu.workers import Memory, Recording, recording
from curkv.models.decoder import Decoder

logger = logging.getLogger(__name__)

_ALLOCATIONS = {torch.ops.aten.empty, torch.ops.aten.detach}


class RecordedDecodes:
    """Runs steps in which every sequence has one new token, as `DecodeGraphs` does on a GPU.

    The first step of a batch size is run kernel by kernel and recorded. Its inputs are copied into buffers
    that never move; page table, lengths and pages are the cache's own tensors and never move either. All
    recordings share the memory of what they compute.

    Args:
        model: the model.
        attention: its attention.
    """

    def __init__(self, model: Decoder, attention: PagedAttention):
        most = attention.kv.layout.max_sequences
        self._model = model
        self._attention = attention
        self._memory = Memory()
        self._recordings: dict[int, tuple[Recording, Batch, Tensor]] = {}
        self._token_ids = torch.zeros(most, dtype=torch.int64)
        self._positions = torch.zeros(most, dtype=torch.int32)
        self._slots = torch.zeros(most, dtype=torch.int32)
        self._recordable = True
        self._rows = torch.arange(most + 1, dtype=torch.int32)

    def forward(self, batch: Batch) -> Tensor:
        """Runs a step of decodes only.

        Args:
            batch: B sequences with one token each.

        Returns:
            float32 [R, vocab_size], logits of `batch.logit_rows`; overwritten by the next step.
        """
        if not self._recordable:
            return self._model.forward(batch, self._attention)
        size = batch.num_decodes
        self._token_ids[:size] = batch.token_ids
        self._positions[:size] = batch.positions
        self._slots[:size] = batch.slots
        if size in self._recordings:
            recorded, _, logits = self._recordings[size]
            recorded.run()
        else:
            try:
                logits = self._record(size)
            except RuntimeError as error:
                self._recordable = False
                logger.warning("decode steps are run kernel by kernel: %s", error)
                return self.forward(batch)
        return logits if len(batch.logit_rows) == size else logits[batch.logit_rows]

    def _record(self, size: int) -> Tensor:
        """Runs a step and keeps its recording; if that fails, the step can be run again."""
        batch = Batch(
            token_ids=self._token_ids[:size],
            positions=self._positions[:size],
            slots=self._slots[:size],
            query_start=self._rows[: size + 1],
            num_decodes=size,
            logit_rows=torch.arange(size),
        )
        with recording(self._memory) as recorded, _LaunchesOnly():  # type: ignore[no-untyped-call]
            logits = self._memory.unowned(self._model.forward(batch, self._attention))
        self._recordings[size] = recorded, batch, logits
        return logits


class _LaunchesOnly(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises where torch computes something, which a recording would leave out."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: to skip it, torch would import its compiler, which takes 100 MB."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not (func.is_view or func.overloadpacket in _ALLOCATIONS):
            raise RuntimeError(f"{func} cannot be recorded: it is no launch of a kernel")
        return func(*args, **(kwargs or {}))
