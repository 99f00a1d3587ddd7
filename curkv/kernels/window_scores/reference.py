"""How much attention the newest queries pay to each stored token, in plain torch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from curkv.kernels.paged_decode_attention.reference import (
    gather_tokens,
    gather_vectors,
    softcapped,
    with_sinks,
)
from curkv.kernels.pages import Pages, longest


def window_scores(
    queries: Tensor,
    pages: Pages,
    table: Tensor,
    lengths: Tensor,
    scale: float,
    reduction: Literal["mean", "max"] = "mean",
    lse: Tensor | None = None,
    width: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Score the stored tokens of every head by the attention of the last w queries.

    SnapKV (https://arxiv.org/abs/2404.14469, section 4; w = 1 is TOVA's, https://arxiv.org/abs/2401.06104):
    each query's softmax runs over all tokens stored in the row that are not newer than the query, and the
    probabilities are averaged over the window and the group ("max": their largest, as in DefensiveKV,
    https://arxiv.org/abs/2510.13334). The last token stored in a row is the last query's own, and the queries
    are consecutive: query i of the window reads tokens up to position `position[last] - (w - 1) + i`. A query
    that may read none pays nothing. With `lse` the queries are those of a chunk behind the row, so that each
    reads all of it.

    Args:
        queries: [N, w, group, head_dim], after RoPE, of the group of each row's KV head; float32, or with
            `lse` as attention took them.
        pages: The page pool.
        table: int32 [N, max_pages], pages of each row; a row is one (layer, KV head) of a sequence.
        lengths: int32 [N], tokens of each row, those of the window included, those of a chunk not.
        scale: Factor of the attention scores, usually head_dim ** -0.5.
        reduction: Over window and group, "mean" or "max".
        lse: float32 [N, w, group], log-sum-exp of each query's scaled scores, of tokens that are not in the
            row and sinks too, as from `paged_prefill_attention`.
        width: Tokens of the longest row if they are known; else the device is asked.
        softcap: As attention was told.
        sinks: float32 [N, group], as attention was told.

    Returns:
        float32 [N, max(lengths)], -inf past a row's length.
    """
    window = queries.shape[1]
    width = longest(lengths) if width is None else width
    scores = torch.full((len(lengths), width), -torch.inf, device=queries.device)
    for row, length in enumerate(lengths.tolist()):
        if length:
            keys = gather_vectors(pages.k, table[row], length)
            position = gather_tokens(pages.position, table[row], length)
            newest = position[-1] - torch.arange(window - 1, -1, -1, device=position.device)
            logits = softcapped(scale * torch.einsum("wgd,nd->wgn", queries[row].float(), keys), softcap)
            if lse is None:
                logits.masked_fill_(position > newest[:, None, None], -torch.inf)
            extra = None if sinks is None else sinks[row]
            whole = with_sinks(logits, extra).logsumexp(-1) if lse is None else lse[row]
            paid = (logits - whole[..., None]).exp().nan_to_num(0.0).flatten(0, 1)
            scores[row, :length] = paid.mean(0) if reduction == "mean" else paid.amax(0)
    return scores
