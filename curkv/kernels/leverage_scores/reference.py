"""CurDKV's approximate leverage scores over ragged pages, in plain torch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from curkv.kernels.formats.base import Store
from curkv.kernels.pages import Pages, longest


def leverage_scores(
    pages: Pages,
    table: Tensor,
    lengths: Tensor,
    *,
    normalization: Literal["window", "head"] = "window",
    window: int = 16,
    partial: Literal["corrected", "left", "right"] = "corrected",
    combine: Literal["product", "mean", "key", "value"] = "product",
    sketch: Tensor | None = None,
    width: int | None = None,
) -> Tensor:
    """Score the stored tokens of every head by the energy of their key and value.

    CurDKV (https://arxiv.org/abs/2509.15038): the energies are ||k||^2 and ||v||^2, read from the side
    arrays, or ||k G||^2 and ||v G||^2 of the stored K and V (section 3, "approximate leverage scores"). With
    normalization "window", as the authors released it, each is divided by its sum over a window of
    consecutive stored tokens before the two are combined; with "head", as the paper writes it, they are
    combined as they are. Scores sum to 1 per row in the end. Zero energies score 0.

    Args:
        pages: The page pool.
        table: int32 [N, max_pages], pages of each row; a row is one (layer, KV head) of a sequence.
        lengths: int32 [N], tokens of each row.
        normalization: "window" or "head".
        window: Tokens per window, 16 in the released code.
        partial: Where the window lies that holds fewer than `window` tokens: over a row's first tokens
            ("left", the authors' padding) or last ones ("right", kvpress's); its tokens score too high by its
            smaller sum. "corrected": last, its sum scaled by window / tokens in it.
        combine: "product", "mean", "key" or "value".
        sketch: float32 [head_dim, rank], the matrix G; None uses the plain norms.
        width: Tokens of the longest row if they are known; else the device is asked.

    Returns:
        float32 [N, max(lengths)], -inf past a row's length.
    """
    width = longest(lengths) if width is None else width
    stored = torch.arange(width, device=lengths.device) < lengths[:, None]
    if sketch is None:
        key, value = (_gather(side, table, stored) for side in (pages.k_sq, pages.v_sq))
    else:
        key, value = (
            (_vectors(store, table, stored) @ sketch).square().sum(-1) for store in (pages.k, pages.v)
        )
    if normalization == "window":
        shift = -lengths[:, None] % window if partial == "left" else torch.zeros_like(lengths[:, None])
        number = (torch.arange(width, device=lengths.device) + shift) // window
        key, value = (
            _share_of_window(x, stored, number, window, partial == "corrected") for x in (key, value)
        )
    combined = {"product": key * value, "mean": (key + value) / 2, "key": key, "value": value}[combine]
    return _share(combined, combined.sum(-1, keepdim=True)).masked_fill(~stored, -torch.inf)


def _gather(storage: Tensor, table: Tensor, stored: Tensor) -> Tensor:
    """Read numbers [N, width] of every row's tokens; what is not stored reads as 0."""
    tokens = storage.new_zeros(stored.shape)
    tokens[stored] = storage[_places(table, stored, storage.shape[1])]
    return tokens


def _vectors(store: Store, table: Tensor, stored: Tensor) -> Tensor:
    """Read keys or values, float32 [N, width, head_dim]; what is not stored reads as 0."""
    vectors = torch.zeros(*stored.shape, store.head_dim, device=table.device)
    vectors[stored] = store.read(*_places(table, stored, store.page_size))
    return vectors


def _places(table: Tensor, stored: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """Page and place in the page of each stored token, row by row."""
    row, index = stored.nonzero(as_tuple=True)
    return table[row, index // page_size].long(), index % page_size


def _share_of_window(energy: Tensor, stored: Tensor, number: Tensor, window: int, corrected: bool) -> Tensor:
    """Divide energies [N, width] by the sum of their window, whose `number` is [N, width]."""
    sums = energy.new_zeros(energy.shape[0], energy.shape[1] // window + 2)
    counts = sums.scatter_add(1, number, stored.float())
    sums = sums.scatter_add(1, number, energy)
    if corrected:
        sums = sums * (window / counts.clamp_min(1))
    return _share(energy, sums.gather(1, number))


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """Divide, with 0 / 0 = 0."""
    return torch.where(whole > 0, part / whole, 0.0)
