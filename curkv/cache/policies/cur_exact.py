"""Exact leverage of keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from curkv.cache.policies.curdkv import CurDKV
from curkv.cache.presets import Leverage


@dataclass(frozen=True, kw_only=True)
class CurExact(CurDKV):
    """Leverage as the theory of CUR has it, mean of keys and values, largest of 7 neighbours.

    diag(X (X^T X)^-1 X^T) of the centred keys, and of the centred values; the newest tokens are kept.

    The best policy measured here that sees no query, for contexts compressed before the question is known
    (docs/policies.md).
    """

    name: str = "cur-exact"
    description: str = (
        "exact leverage of keys and values: recommended when the question comes after compression"
    )
    leverage: Leverage = "exact"
    combine: Literal["product", "mean", "key", "value"] = "mean"
    pool: int = 7
