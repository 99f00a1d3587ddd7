"""AdaCurDKV."""

from __future__ import annotations

from curkv.cache.options import Allocation
from curkv.cache.policies.curdkv import CurDKV


class AdaCurDKV(CurDKV):
    """CurDKV's scores with Ada-KV's allocation (https://arxiv.org/abs/2509.15038 section 4; Ada-KV,
    https://arxiv.org/abs/2407.11550, algorithm 1).

    The heads of a layer share their tokens by score; each is sure of its best alpha * k, alpha = 0.2 of the k
    tokens kept per head on average.
    """

    name = "adacurdkv"
    description = "AdaCurDKV: CurDKV's scores, heads of a layer compete for its tokens above a floor"
    allocation: Allocation = "adaptive"
