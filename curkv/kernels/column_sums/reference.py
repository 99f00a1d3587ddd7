"""How much attention each stored token received from a chunk of queries, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from curkv.kernels.paged_decode_attention.reference import gather_tokens, gather_vectors, softcapped
from curkv.kernels.pages import Pages


def column_sums(
    q: Tensor,
    lse: Tensor,
    pages: Pages,
    table: Tensor,
    lengths: Tensor,
    slots: Tensor,
    query_start: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    """Add the attention that a chunk's queries pay to each stored token to `pages.attention`.

    H2O's score (https://arxiv.org/abs/2306.14048, section 4): the sum of softmax(scale q K^T) over the
    queries and over the group, where query i of a chunk of c reads the stored tokens j < length - c + i + 1,
    as in `paged_prefill_attention`, whose log-sum-exp it takes.

    Args:
        q: float32 [T, Hq, head_dim], after RoPE; any stride over tokens and heads.
        lse: float32 [T, Hq], log-sum-exp of the scaled scores, sinks included.
        pages: The page pool; its `attention` is written.
        table: int32 [max_sequences, H, max_pages], page of each (sequence, head, page index).
        lengths: int32 [max_sequences, H], tokens of each head, the chunk included.
        slots: int32 [B], row of `table` of each sequence in the batch.
        query_start: int32 [B + 1], cumulative count of queries.
        scale: Factor of the scores, usually head_dim ** -0.5.
        window: As attention was told.
        softcap: As attention was told.
    """
    page_size, num_heads = pages.page_size, table.shape[1]
    group = q.shape[1] // num_heads
    starts = query_start.tolist()
    for slot, start, end in zip(slots.tolist(), starts, starts[1:], strict=False):
        for head in range(num_heads):
            length, row = int(lengths[slot, head]), table[slot, head]
            keys = gather_vectors(pages.k, row, length)
            heads = slice(head * group, (head + 1) * group)
            scores = softcapped(
                scale * torch.einsum("tgd,nd->tgn", q[start:end, heads].float(), keys), softcap
            )
            index = torch.arange(length, device=q.device)
            last = index[length - (end - start) :]
            hidden = index > last[:, None]
            if window is not None:
                position = gather_tokens(pages.position, row, length)
                hidden |= position <= position[last, None] - window
            paid = (scores - lse[start:end, heads, None]).exp()
            paid.masked_fill_(hidden[:, None], 0.0)
            pages.attention[row[index // page_size].long(), index % page_size] += paid.sum((0, 1))
