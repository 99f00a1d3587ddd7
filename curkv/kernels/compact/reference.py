"""Moving kept tokens to the front of a head's pages, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from curkv.kernels.pages import Pages


def compact(pages: Pages, source: Tensor, target: Tensor, indices: Tensor, counts: Tensor) -> None:
    """Move tokens of each row, with everything a page holds about them, bit for bit.

    Token i of a row moves from index `indices[row, i]` of its source pages to index i of its target pages. A
    target page is the source page of the same place (in place: tokens only move forward, so none is
    overwritten before it has moved) or a page that no row reads.

    Args:
        pages: The page pool, written in place.
        source: int32 [N, max_pages], pages of each row; a row is one (layer, KV head) of a sequence.
        target: int32 [N, max_pages], pages that receive the tokens.
        indices: int32 [N, max_kept], strictly ascending; read up to a row's count only.
        counts: int32 [N], tokens that move.
    """
    page_size = pages.page_size
    row, to = (torch.arange(indices.shape[1], device=counts.device) < counts[:, None]).nonzero(as_tuple=True)
    index = indices[row, to].long()
    read = source[row, index // page_size].long(), index % page_size
    write = target[row, to // page_size].long(), to % page_size
    for storage in pages.arrays.values():
        storage[write] = storage[read]
