"""Bodies of GET /v1/kv/state, GET /v1/kv/policies and DELETE /v1/kv/prefixes."""

from __future__ import annotations

from pydantic import BaseModel

from curkv.engine.stats import SequenceStats


class State(BaseModel):
    """The engine after its last step.

    Attributes:
        phase: `loading`, `ready`, `draining`, `stopped` or `dead`.
        model: name of the model served.
        running: sequences in prefill or decode.
        waiting: sequences in the queue.
        used_bytes: bytes of the pages in use.
        capacity_bytes: bytes of all pages.
        stranded_slots_ratio: token slots of used pages that hold no token / all their slots, 0 to 1.
        windows: by layer, the newest tokens that a query attends to; null: all.
        sequences: the running sequences.
    """

    phase: str
    model: str
    running: int
    waiting: int
    used_bytes: int
    capacity_bytes: int
    stranded_slots_ratio: float
    windows: list[int | None]
    sequences: list[SequenceStats]


class DroppedPrefixes(BaseModel):
    """What dropping prefixes gave back.

    Attributes:
        freed_bytes: bytes of the pages that went back to the pool.
    """

    freed_bytes: int


class PolicyCard(BaseModel):
    """A policy that a request can name."""

    name: str
    description: str


class PolicyList(BaseModel):
    """All policies."""

    data: list[PolicyCard]
