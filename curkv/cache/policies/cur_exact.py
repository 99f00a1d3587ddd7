"""Exact leverage of keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from curkv.cache.policies.curdkv import CurDKV


class CurExact(CurDKV):
    """Leverage as the theory of CUR has it, mean of keys and values, largest of 7 neighbours.

    diag(X (X^T X)^-1 X^T) of the centred keys, and of the centred values; the newest tokens are kept.

    The best policy measured here that sees no query, for contexts compressed before the question is known
    (docs/policies.md).
    """

    name = "cur-exact"
    description = "exact leverage of keys and values: recommended when the question comes after compression"
    defaults: Mapping[str, Any] = {"leverage": "exact", "combine": "mean", "pool": 7, "pool_kind": "max"}
