"""Decode steps at a few fixed batch sizes, which a GPU replays as CUDA graphs."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from curkv.cache.attention import PagedAttention
from curkv.cache.batch import Batch
from curkv.models.decoder import Decoder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    logits: Tensor


class DecodeGraphs:
    """Runs steps in which every sequence has one new token.

    The batch is copied into buffers that never move and filled up to the next of the sizes 1, 2, 4, ... with
    rows of no sequence (slot -1), which the Triton kernels neither store nor attend for. Page table and
    lengths are the cache's own tensors and never move either. So all that changes from step to step is in
    place before the graph starts, and the host waits for nothing but the logits.

    Without a captured graph, because there is no GPU or capturing failed, the same padded step runs kernel by
    kernel.

    Args:
        model: the model.
        attention: its attention.
    """

    def __init__(self, model: Decoder, attention: PagedAttention):
        self._model = model
        self._attention = attention
        kv = attention.kv
        most = kv.layout.max_sequences
        self._sizes = [*(1 << i for i in range((most - 1).bit_length())), most]
        self._graphs: dict[int, _Graph] = {}
        self._token_ids = torch.zeros(most, dtype=torch.int64, device=kv.device)
        self._positions = torch.zeros(most, dtype=torch.int32, device=kv.device)
        self._slots = torch.full((most,), -1, dtype=torch.int32, device=kv.device)
        rows = torch.arange(most + 1, dtype=torch.int32, device=kv.device)
        self._batches = {
            size: Batch(
                token_ids=self._token_ids[:size],
                positions=self._positions[:size],
                slots=self._slots[:size],
                query_start=rows[: size + 1],
                num_decodes=size,
                logit_rows=rows[:size].long(),
            )
            for size in self._sizes
        }

    def forward(self, batch: Batch) -> Tensor:
        """Runs a step of decodes only.

        Args:
            batch: B sequences with one token each.

        Returns:
            float32 [R, vocab_size], logits of `batch.logit_rows`; overwritten by the next step.
        """
        count = batch.num_decodes
        size = next(size for size in self._sizes if size >= count)
        self._token_ids[:count].copy_(batch.token_ids)
        self._positions[:count].copy_(batch.positions)
        self._slots[:count].copy_(batch.slots)
        self._slots[count:].fill_(-1)
        self._positions[count:].fill_(0)
        captured = self._graphs.get(size)
        if captured is None:
            logits = self._model.forward(self._batches[size], self._attention)
        else:
            captured.graph.replay()
            logits = captured.logits
        return logits.index_select(0, batch.logit_rows)

    def capture(self) -> None:
        """Captures a graph for every batch size, largest first so that the others reuse its memory.

        All rows are of no sequence while capturing, so nothing in the cache changes. If it fails, steps run
        without graphs, and a warning says why.
        """
        self._slots.fill_(-1)
        try:
            pool = torch.cuda.graph_pool_handle()
            for size in reversed(self._sizes):
                self._model.forward(self._batches[size], self._attention)
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    logits = self._model.forward(self._batches[size], self._attention)
                self._graphs[size] = _Graph(graph, logits)
        except RuntimeError as error:
            self._graphs.clear()
            logger.warning("decode runs without CUDA graphs: %s", error)
