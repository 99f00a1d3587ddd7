"""Writing new keys and values into pages, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from curkv.kernels.pages import Pages
from curkv.kernels.rope.reference import rope


def store_kv(
    pages: Pages,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    table: Tensor,
    lengths: Tensor,
    slots: Tensor,
    query_start: Tensor,
    q: Tensor | None = None,
) -> None:
    """Rotate the new keys and write them, their values and the per-token side arrays into pages.

    Token i of the c new tokens of a sequence goes to index `lengths[slot, h] - c + i` of head h. The squared
    norms are those of the float32 vectors, before they are rounded to the cache's format; the attention
    received so far starts at 0.

    Args:
        pages: The page pool, written in place.
        k: float32 [T, H, head_dim], keys before RoPE; any stride over tokens and heads.
        v: float32 [T, H, head_dim], values; likewise.
        cos: float32 [max_positions, head_dim / 2].
        sin: float32 [max_positions, head_dim / 2].
        positions: int32 [T], logical position of each token.
        table: int32 [max_sequences, H, max_pages], page of each (sequence, head, page index).
        lengths: int32 [max_sequences, H], tokens of each head, the new ones included.
        slots: int32 [B], row of `table` of each sequence in the batch.
        query_start: int32 [B + 1], cumulative count of new tokens.
        q: float32 [T, Hq, head_dim], their queries, which are rotated in place, see `rope`; None: none are.
    """
    if q is not None:
        rope(q, cos, sin, positions)
    page_size = pages.page_size
    k, v = k.to(torch.float32, copy=True), v.float()
    rope(k, cos, sin, positions)
    starts = query_start.tolist()
    for slot, start, end in zip(slots.tolist(), starts, starts[1:], strict=False):
        steps = torch.arange(end - start, device=k.device)
        for head in range(k.shape[1]):
            index = int(lengths[slot, head]) - (end - start) + steps
            where = table[slot, head][index // page_size].long(), index % page_size
            keys, values = k[start:end, head], v[start:end, head]
            pages.k.write(keys, *where)
            pages.v.write(values, *where)
            pages.position[where] = positions[start:end]
            pages.k_sq[where] = keys.square().sum(-1)
            pages.v_sq[where] = values.square().sum(-1)
            pages.attention[where] = torch.zeros(end - start, device=k.device)
