"""Published and recommended settings by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Leverage = Literal["window", "norm", "sketch", "exact"]
PartialWindow = Literal["corrected", "left", "right"]


@dataclass(frozen=True)
class Preset:
    """Published or recommended settings.

    Attributes:
        name: As a request names it.
        leverage: CurDKV's "window" or "sketch".
        partial_window: How "window" treats the last, partial window; see `leverage_scores`.
        sink_tokens: First tokens kept; None: as the policy was published.
        recent_tokens: Newest tokens kept, or a quarter of the budget if that is less.
        norm_order: Of the norm of a value behind W_o: 1 as published, 2 for a small part of the work.
        like_kvpress: Details in which kvpress differs from the papers are as there.
    """

    name: str
    leverage: Leverage
    partial_window: PartialWindow
    sink_tokens: int | None
    recent_tokens: int
    norm_order: Literal[1, 2] = 1
    like_kvpress: bool = False


PRESETS = {
    preset.name: preset
    for preset in (
        # Without a recent window a policy that reads no queries loses the thread of the text.
        Preset("serving", "window", "corrected", sink_tokens=4, recent_tokens=64, norm_order=2),
        Preset("paper", "sketch", "corrected", sink_tokens=None, recent_tokens=0),
        Preset("authors", "window", "left", sink_tokens=None, recent_tokens=0),
        Preset("kvpress", "window", "right", sink_tokens=None, recent_tokens=0, like_kvpress=True),
    )
}
