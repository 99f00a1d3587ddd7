"""SnapCUR."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from curkv.cache.policies.snapkv import SnapKV


class SnapCur(SnapKV):
    """The attention of the last tokens times CUR's leverage: who is looked at, and carries something.

    SnapKV's scores (window 32, mean over 15 neighbours) multiplied with CurDKV's (largest of 7 neighbours).
    The best policy measured here for requests whose question is part of the prompt (docs/policies.md).
    """

    name = "snapcur"
    description = "SnapKV's attention times CurDKV's leverage: recommended when the prompt holds the question"
    defaults: Mapping[str, Any] = {
        "observation": 32,
        "pool": 15,
        "pool_kind": "mean",
        "times": "curdkv",
        "times_pool": 7,
    }
