"""Attention of chunks of new tokens over ragged pages, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from curkv.kernels.paged_decode_attention.reference import (
    gather_tokens,
    gather_vectors,
    softcapped,
    with_sinks,
)
from curkv.kernels.pages import Pages


def paged_prefill_attention(
    q: Tensor,
    pages: Pages,
    table: Tensor,
    lengths: Tensor,
    slots: Tensor,
    query_start: Tensor,
    scale: float,
    return_lse: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend with a chunk of queries per sequence, whose own keys are stored already.

    out = softmax(scale q K^T) V, where query i of a chunk of c reads the stored tokens
    j < length - c + i + 1: all that was kept before the chunk, and the chunk up to itself. Query head i reads
    KV head i // (Hq / H). Tokens are sorted by position.

    Args:
        q: float32 or bfloat16 [T, Hq, head_dim], after RoPE; any stride over tokens and heads. With bfloat16,
            kernels may round K, V and the softmax to it before they multiply.
        pages: The page pool.
        table: int32 [max_sequences, H, max_pages], page of each (sequence, head, page index).
        lengths: int32 [max_sequences, H], tokens of each head, the chunk included.
        slots: int32 [B], row of `table` of each sequence in the batch. Below 0, which the CPU's kernel takes
            not, it stands for no sequence: its rows may be anything.
        query_start: int32 [B + 1], cumulative count of queries.
        scale: Factor of the scores, usually head_dim ** -0.5.
        return_lse: Return the log-sum-exp of the scaled scores too, sinks included.
        window: Positions that a query reads, its own the last of them, wherever their tokens are stored;
            None: all.
        softcap: Scaled scores x become softcap tanh(x / softcap); None: they do not.
        sinks: float32 [Hq], the score of one more token of each query head, whose value is 0 (gpt-oss).

    Returns:
        float32 [T, Hq, head_dim]; with `return_lse` also float32 [T, Hq].
    """
    num_heads = table.shape[1]
    group = q.shape[1] // num_heads
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    lse = torch.zeros(q.shape[:2], dtype=torch.float32, device=q.device)
    starts = query_start.tolist()
    for slot, start, end in zip(slots.tolist(), starts, starts[1:], strict=False):
        for head in range(num_heads if slot >= 0 else 0):
            length, row = int(lengths[slot, head]), table[slot, head]
            keys = gather_vectors(pages.k, row, length)
            values = gather_vectors(pages.v, row, length)
            heads = slice(head * group, (head + 1) * group)
            scores = softcapped(
                scale * torch.einsum("tgd,nd->tgn", q[start:end, heads].float(), keys), softcap
            )
            last = torch.arange(length - (end - start), length, device=q.device)
            hidden = torch.arange(length, device=q.device) > last[:, None]
            if window is not None:
                position = gather_tokens(pages.position, row, length)
                hidden |= position <= position[last, None] - window
            scores = with_sinks(
                scores.masked_fill_(hidden[:, None], -torch.inf), None if sinks is None else sinks[heads]
            )
            lse[start:end, heads] = scores.logsumexp(-1)
            weights = scores.softmax(-1)[..., :length]
            out[start:end, heads] = torch.einsum("tgn,nd->tgd", weights, values)
    return (out, lse) if return_lse else out
