"""What a client saw of a workload, reduced to figures that can be compared."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from curkv.bench.workload import Workload


@dataclass(frozen=True)
class Measurement:
    """What one contender did with one workload; times in seconds.

    Of questions about a document, TTFT and the rates are those of the first one.

    Attributes:
        contender: who.
        workload: what.
        ttft: mean time to first token.
        itl_p50: median time between tokens of a request.
        itl_p99: its 99th percentile.
        prefill_rate: prompt tokens per second until the last request has its first token.
        decode_rate: tokens per second from when all requests have their first token until the first ends;
            None if that is no time at all.
        later_ttft: median time to first token of the questions after the first; None without a document.
        kept_ratio: share of the prompt's KV cache that was kept; None if the server does not say.
        peak_bytes: most memory that the server's processes held; None if that was not looked at.
    """

    contender: str
    workload: Workload
    ttft: float
    itl_p50: float
    itl_p99: float
    prefill_rate: float
    decode_rate: float | None
    later_ttft: float | None = None
    kept_ratio: float | None = None
    peak_bytes: int | None = None


@dataclass
class Stream:
    """A request as the client saw it.

    Attributes:
        started: when it was sent, in seconds.
        arrivals: when each token came.
        kept_ratio: what the server said of it.
    """

    started: float
    arrivals: list[float]
    kept_ratio: float | None = None

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.arrivals[0] - self.started


def summary(contender: str, workload: Workload, streams: Sequence[Stream]) -> Measurement:
    """Reduces what the client saw of all requests of a workload."""
    gaps = sorted(b - a for s in streams for a, b in zip(s.arrivals, s.arrivals[1:], strict=False))
    together = streams[:1] if workload.document_tokens else streams
    all_started = max(s.arrivals[0] for s in together)
    first_ended = min(s.arrivals[-1] for s in together)
    decoded = sum(all_started < at <= first_ended for s in together for at in s.arrivals)
    prefilled = len(together) * (workload.document_tokens + workload.prompt_tokens)
    kept = [s.kept_ratio for s in streams if s.kept_ratio is not None]
    return Measurement(
        contender=contender,
        workload=workload,
        ttft=statistics.mean(s.ttft for s in together),
        itl_p50=gaps[len(gaps) // 2],
        itl_p99=gaps[int(len(gaps) * 0.99)],
        prefill_rate=prefilled / (all_started - together[0].started),
        decode_rate=decoded / (first_ended - all_started) if decoded else None,
        later_ttft=statistics.median(s.ttft for s in streams[1:]) if workload.document_tokens else None,
        kept_ratio=statistics.mean(kept) if kept else None,
    )


def medians(samples: Sequence[Measurement]) -> list[Measurement]:
    """Reduces the repeats of each contender and workload to the median of every figure."""
    groups: dict[tuple[Workload, str], list[Measurement]] = {}
    for sample in samples:
        groups.setdefault((sample.workload, sample.contender), []).append(sample)
    return [_median(repeats) for repeats in groups.values()]


def _median(repeats: Sequence[Measurement]) -> Measurement:
    figures: dict[str, Any] = {}
    for field in fields(Measurement)[2:]:
        known = [value for m in repeats if (value := getattr(m, field.name)) is not None]
        figures[field.name] = statistics.median_low(known) if known else None
    return replace(repeats[0], **figures)
