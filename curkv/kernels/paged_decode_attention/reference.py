"""Attention of one new token per sequence over ragged pages, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from curkv.kernels.formats.base import Store
from curkv.kernels.pages import Pages


def gather_tokens(storage: Tensor, row: Tensor, length: int) -> Tensor:
    """Read the first `length` tokens of one head.

    Args:
        storage: [num_pages, page_size, ...], one of the tensors of `Pages`.
        row: int32 [max_pages], the head's row of the page table.
        length: Tokens of the head.

    Returns:
        [length, ...], a copy in the dtype of `storage`.
    """
    num_pages = -(-length // storage.shape[1])
    return storage[row[:num_pages].long()].flatten(0, 1)[:length]


def gather_vectors(store: Store, row: Tensor, length: int) -> Tensor:
    """Read the first `length` keys or values of one head: float32 [length, head_dim].

    Args:
        store: `Pages.k` or `Pages.v`.
        row: int32 [max_pages], the head's row of the page table.
        length: Tokens of the head.
    """
    num_pages = -(-length // store.page_size)
    return store.read(row[:num_pages].long()).flatten(0, 1)[:length]


def softcapped(scores: Tensor, softcap: float | None) -> Tensor:
    """softcap tanh(scores / softcap); the scores themselves without one (Gemma 2)."""
    return scores if softcap is None else softcap * (scores / softcap).tanh()


def with_sinks(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Scores [..., n] and behind them those of sinks [...], if there are any: [..., n or n + 1]."""
    if sinks is None:
        return scores
    return torch.cat([scores, sinks.expand(scores.shape[:-1])[..., None].to(scores.dtype)], -1)


def paged_decode_attention(
    q: Tensor,
    pages: Pages,
    table: Tensor,
    lengths: Tensor,
    slots: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend with one query per sequence over the kept tokens of each KV head.

    out = softmax(scale q K^T) V. Query head i reads KV head i // (Hq / H); a head without tokens gives 0.
    Tokens are sorted by position, and the last one is the query's own.

    Args:
        q: float32 [B, Hq, head_dim], after RoPE; any stride over sequences and heads.
        pages: The page pool.
        table: int32 [max_sequences, H, max_pages], page of each (sequence, head, page index).
        lengths: int32 [max_sequences, H], tokens of each head, this step's new one included.
        slots: int32 [B], row of `table` of each sequence in the batch.
        scale: Factor of the scores, usually head_dim ** -0.5.
        window: Positions that a query reads, its own the last of them, wherever their tokens are stored;
            None: all.
        softcap: Scaled scores x become softcap tanh(x / softcap); None: they do not.
        sinks: float32 [Hq], the score of one more token of each query head, whose value is 0 (gpt-oss).

    Returns:
        float32 [B, Hq, head_dim].
    """
    num_heads = table.shape[1]
    group = q.shape[1] // num_heads
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    for i, slot in enumerate(slots.tolist()):
        for head in range(num_heads):
            length, row = int(lengths[slot, head]), table[slot, head]
            keys = gather_vectors(pages.k, row, length)
            values = gather_vectors(pages.v, row, length)
            heads = slice(head * group, (head + 1) * group)
            scores = softcapped(scale * (q[i, heads].float() @ keys.T), softcap)
            if window is not None and length:
                position = gather_tokens(pages.position, row, length)
                scores.masked_fill_(position <= position[-1] - window, -torch.inf)
            scores = with_sinks(scores, None if sinks is None else sinks[heads])
            probabilities = torch.softmax(scores, dim=-1)[:, :length]
            out[i, heads] = probabilities @ values
    return out
