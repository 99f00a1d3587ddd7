"""What is told of sequences and steps: plain records, made from where things stand."""

from __future__ import annotations

import itertools
import time

from curkv.cache.page_manager import PageManager
from curkv.cache.reuse import PrefixReuse
from curkv.cache.store import StoreStats
from curkv.engine.scheduler import Schedule, Scheduler
from curkv.engine.sequence import Sequence
from curkv.engine.stats import EvictionStats, RequestStats, SequenceStats, StepStats
from curkv.engine.stopping import Stop
from curkv.engine.types import FinishReason, KVReport, Output, TokenLogprob


class StepReport:
    """What happened since the last step ended: the engine adds to it, and a new one begins with each step."""

    def __init__(self) -> None:
        self.outputs: list[Output] = []
        self.evictions: list[EvictionStats] = []
        self.finished: list[RequestStats] = []

    @property
    def sampled(self) -> int:
        """Tokens sampled."""
        return sum(len(output.token_ids) for output in self.outputs)

    def finish(self, sequence: Sequence, reason: FinishReason, report: KVReport | None) -> None:
        """Notes the end of a sequence, and of the choices that were to share its prompt."""
        for fork in sequence.forks:
            self.finished.append(_request_stats(fork, reason, None))
        self.finished.append(_request_stats(sequence, reason, report))

    def bare_stats(self, scheduler: Scheduler, seconds: float) -> StepStats:
        """What can be told of the step without looking at the cache."""
        return StepStats(
            running=len(scheduler.running),
            waiting=scheduler.num_waiting,
            used_pages=0,
            num_pages=0,
            used_bytes=0,
            capacity_bytes=0,
            generation_tokens=self.sampled,
            evictions=self.evictions,
            finished=self.finished,
            step_seconds=seconds,
        )

    def stats(
        self, kv: PageManager, reuse: PrefixReuse, scheduler: Scheduler, step: Schedule, seconds: float
    ) -> StepStats:
        """Where the engine stands after the step."""
        usage = kv.usage
        prompt_tokens = sum(
            min(s.computed, len(s.prompt)) - max(0, min(s.computed - c, len(s.prompt)))
            for s, c in zip(step.sequences, step.chunks, strict=True)
        )
        return StepStats(
            running=len(scheduler.running),
            waiting=scheduler.num_waiting,
            used_pages=usage.used_pages,
            num_pages=usage.num_pages,
            used_bytes=usage.used_bytes,
            capacity_bytes=usage.capacity_bytes,
            stranded_slots_ratio=usage.stranded_slots_ratio,
            prefix_bytes=usage.prefix_bytes,
            prefix_saved_bytes=usage.saved_bytes,
            prefix_queries=sum(len(s.prompt) for s in step.admitted) if kv.prefixes.max_pages else 0,
            prefix_hits=sum(s.cached_tokens for s in step.admitted),
            prompt_tokens=prompt_tokens,
            generation_tokens=self.sampled,
            kv_tokens_written=sum(step.chunks) * kv.layout.num_heads,
            preemptions=step.preempted,
            evictions=self.evictions,
            started=[s.request.id for s in step.admitted],
            finished=self.finished,
            sequences=[_sequence_stats(kv, sequence) for sequence in scheduler.running],
            step_seconds=seconds,
            sessions=len(reuse.sessions),
            session_bytes=reuse.sessions.held_pages * kv.page_bytes,
            store=reuse.store.stats if reuse.store is not None else StoreStats(),
            exchanged=dict(kv.ranks.exchanged),
        )


def kv_report(kv: PageManager, sequence: Sequence) -> KVReport | None:
    """What eviction did to a sequence; None before the end of prefill."""
    progress = sequence.progress
    if progress.kept_tokens is None:
        return None
    held = kv.sequence_bytes(sequence.slot) if sequence.slot >= 0 else 0
    return KVReport(
        policy=sequence.plan.policy.name,
        budget_tokens=sequence.plan.kept_prompt_tokens,
        kept_tokens=round(progress.kept_tokens, 3),
        evicted_tokens=round(progress.evicted_tokens, 3),
        kept_ratio=round(progress.kept_tokens / len(sequence.prompt), 6),
        bytes=held,
        peak_bytes=max(sequence.peak_bytes, held),
        decode_evictions=progress.decode_evictions,
        repeated_tokens=progress.repeated_tokens,
        window_layers=kv.layout.num_layers - len(kv.layout.evicted_rows),
    )


def token_output(
    sequence: Sequence, token: int, logprob: TokenLogprob | None, stop: Stop, report: KVReport | None
) -> Output:
    """News of a sequence that has a new token."""
    return Output(
        request_id=sequence.request.id,
        index=sequence.index,
        text=stop.text,
        token_ids=[token],
        logprobs=[logprob] if logprob is not None else None,
        prompt_logprobs=_prompt_logprobs(sequence) if len(sequence.output) == 1 else None,
        finish_reason=stop.reason,
        stop_reason=stop.by,
        problem=stop.problem,
        kv=report,
        cached_tokens=sequence.cached_tokens,
    )


def silent_output(sequence: Sequence, report: KVReport | None) -> Output:
    """News of a sequence that has computed its prompt and generates nothing."""
    return Output(
        request_id=sequence.request.id,
        index=sequence.index,
        text="",
        token_ids=[],
        prompt_logprobs=_prompt_logprobs(sequence),
        explanations=sequence.progress.explanations,
        embedding=_embedding(sequence),
        finish_reason="length",
        kv=report,
        cached_tokens=sequence.cached_tokens,
    )


def _embedding(sequence: Sequence) -> list[float] | None:
    """Mean of the last hidden states of its prompt, if it was asked for."""
    states = sequence.progress.states
    return None if states is None else (states / len(sequence.prompt)).tolist()


def _prompt_logprobs(sequence: Sequence) -> list[TokenLogprob] | None:
    """Log-probabilities of its prompt, if they were asked for."""
    asked = sequence.request.sampling.prompt_logprobs is not None
    return sequence.progress.prompt_logprobs if asked else None


def _sequence_stats(kv: PageManager, sequence: Sequence) -> SequenceStats:
    held = kv.sequence_bytes(sequence.slot)
    return SequenceStats(
        request_id=sequence.request.id,
        index=sequence.index,
        policy=sequence.plan.policy.name,
        prompt_tokens=len(sequence.prompt),
        computed_tokens=sequence.computed,
        generation_tokens=len(sequence.output),
        budget_tokens=sequence.plan.budget_tokens,
        held_tokens=kv.held_tokens(sequence.slot),
        held_bytes=held,
        peak_bytes=max(sequence.peak_bytes, held),
        owner=sequence.request.owner,
    )


def _request_stats(sequence: Sequence, reason: FinishReason, report: KVReport | None) -> RequestStats:
    now = time.monotonic()
    arrival, times = sequence.request.arrival_time, sequence.token_times
    scheduled = sequence.first_run.time if sequence.first_run is not None else now
    first = times[0] if times else now
    return RequestStats(
        finish_reason=reason,
        prompt_tokens=len(sequence.prompt),
        generation_tokens=len(sequence.output),
        queue_seconds=scheduled - arrival,
        prefill_seconds=first - scheduled,
        decode_seconds=times[-1] - first if times else 0.0,
        e2e_seconds=now - arrival,
        ttft_seconds=first - arrival if times else None,
        itl_seconds=[after - before for before, after in itertools.pairwise(times)],
        kv=report,
        request_id=sequence.request.id,
        traceparent=sequence.request.traceparent,
    )
