"""The engine: one step at a time, schedule, run, evict, sample, report."""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from typing import Literal

from torch import Tensor

from curkv.cache.eviction import evict, select
from curkv.cache.explain import explain
from curkv.cache.integrity import check_integrity
from curkv.cache.page_pool import OutOfPages
from curkv.cache.reuse import PrefixReuse
from curkv.engine.detokenizer import Detokenizer
from curkv.engine.planning import Planner
from curkv.engine.reporting import StepReport, kv_report, silent_output, token_output
from curkv.engine.runner import Runner
from curkv.engine.sampling import choice_seed, sample, token_logprobs
from curkv.engine.scheduler import Schedule, Scheduler
from curkv.engine.sequence import Sequence, observed_of
from curkv.engine.stats import EvictionStats
from curkv.engine.stopping import stop_after
from curkv.engine.structure import Structures
from curkv.engine.types import FinishReason, KVReport, Output, Planned, Request
from curkv.models.info import ModelInfo

logger = logging.getLogger(__name__)


class Engine:
    """Runs requests over one model and one cache. Not thread-safe: one thread calls `add`, `abort`, `step`.

    Args:
        runner: the model over its cache.
        info: its tokenizer, and what the server wants to know of it.
        max_step_tokens: most tokens of one step; long prompts are prefilled in chunks of at most this size.
        max_model_len: most tokens of prompt and output together.
        max_itl: seconds that a step with running decodes may take, see `Pace`.
    """

    def __init__(
        self,
        runner: Runner,
        info: ModelInfo,
        max_step_tokens: int,
        max_model_len: int,
        max_itl: float | None = None,
    ):
        config = runner.model.config
        self.runner = runner
        self.kv = runner.kv
        self.info = info
        self.max_model_len = max_model_len
        self.eos_ids = frozenset(info.end_ids(config.eos_token_ids, config.vocab_size))
        self.structures = Structures(info.tokenizer, config.vocab_size, sorted(self.eos_ids))
        self._reuse = PrefixReuse(self.kv)
        self.scheduler = Scheduler(self.kv, self._reuse, max_step_tokens, max_itl)
        num_token_ids = info.num_token_ids(config.vocab_size)
        self._planner = Planner(self.kv, num_token_ids, self.structures, max_model_len)
        self._order = itertools.count()
        self._report = StepReport()
        self.last_stats = self._report.stats(self.kv, self.scheduler, Schedule(), seconds=0.0)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self.scheduler.has_work

    def plan(self, request: Request) -> Planned:
        """Checks a request and resolves its eviction options; takes nothing. Any thread may call it.

        Raises:
            InvalidRequest: it could never be served as asked.
        """
        return self._planner.plan(request)

    def add(self, planned: Planned) -> None:
        """Queues a request; its further choices fork from the first one after prefill."""
        request, plan, matcher = planned.request, planned.eviction, planned.matcher
        sampling, prompt = request.sampling, request.prompt_token_ids
        seed = sampling.seed if sampling.seed is not None else secrets.randbits(64)
        observed, judged = observed_of(plan, planned.explain_plans), sampling.prompt_logprobs is not None
        keys = self._reuse.keys(prompt, plan, observed, request.cache_salt, judged)
        first, *others = [
            Sequence(
                request=request,
                index=index,
                order=next(self._order),
                plan=plan,
                seed=choice_seed(seed, index),
                max_tokens=self._planner.max_tokens(request),
                detokenizer=Detokenizer(
                    self.info.vocabulary, prompt, sampling.stop, sampling.skip_special_tokens
                ),
                matcher=matcher.deep_copy() if matcher is not None else None,
                explain_plans=planned.explain_plans,
                keys=keys,
            )
            for index in range(sampling.n)
        ]
        first.forks = others
        self.scheduler.add(first)

    def drop_prefixes(self) -> int:
        """Drops the prefixes that no running sequence uses; returns the bytes that are free again."""
        return self.kv.prefixes.drop() * self.kv.page_bytes

    def abort(self, request_id: str) -> None:
        """Ends a request wherever it is and frees its pages; unknown ids are ignored."""
        for sequence in self.scheduler.find(request_id):
            self._finish(sequence, "abort")

    def step(self) -> list[Output]:
        """Advances every scheduled sequence by its tokens and returns what is new."""
        self._explain_next()
        started = time.perf_counter()
        schedule = self.scheduler.schedule()
        if schedule.sequences:
            logits = self._run(schedule)
            self._judge_prompts(schedule, logits)
            self._advance(schedule)
            self._sample(self._fork(schedule), logits)
        return self._end_step(schedule, started)

    def fail(self, error: BaseException) -> list[Output]:
        """Ends every running sequence after a step that raised; their pages are freed, the queue stays."""
        logger.error("step failed: its requests end with an error", exc_info=error)
        outputs, self._report.outputs = self._report.outputs, []
        for sequence in list(self.scheduler.running):
            indices = [s.index for s in (sequence, *sequence.forks)]
            self._finish(sequence, "error")
            outputs += [Output(sequence.request.id, i, "", [], finish_reason="error") for i in indices]
        report, self._report = self._report, StepReport()
        self.last_stats = report.stats(self.kv, self.scheduler, Schedule(), seconds=0.0)
        return outputs

    def check_integrity(self) -> None:
        """Checks the cache's invariants; called when the engine is idle."""
        check_integrity(self.kv)

    def _run(self, schedule: Schedule) -> Tensor:
        """Computes the step's tokens; the logits that `schedule.wanted` counts."""
        sequences, chunks = schedule.sequences, schedule.chunks
        return self.runner.run(
            slots=[s.slot for s in sequences],
            tokens=[s.tokens(s.computed, c) for s, c in zip(sequences, chunks, strict=True)],
            starts=[s.computed for s in sequences],
            wanted=schedule.wanted,
        )

    def _judge_prompts(self, schedule: Schedule, logits: Tensor) -> None:
        """Notes the log-probabilities of prompts that want them."""
        ends = itertools.accumulate(schedule.wanted)
        for sequence, count, end in zip(schedule.sequences, schedule.wanted, ends, strict=True):
            if sequence.wants_prompt_logprobs:
                following = sequence.prompt[sequence.computed + 1 : sequence.computed + 1 + count]
                rows = logits[end - count : end - count + len(following)]
                top = sequence.request.sampling.prompt_logprobs or 0
                sequence.progress.prompt_logprobs += token_logprobs(rows, following, top)

    def _advance(self, schedule: Schedule) -> None:
        """Counts the computed tokens, and holds and evicts where a sequence's plan says so."""
        for sequence, chunk in zip(schedule.sequences, schedule.chunks, strict=True):
            slot, start, prompt = sequence.slot, sequence.computed, sequence.prompt
            sequence.progress.computed += chunk
            sequence.peak_bytes = max(sequence.peak_bytes, self.kv.sequence_bytes(slot))
            self._reuse.after_chunk(slot, sequence.keys, prompt, start, sequence.computed)
            self._evict_if_due(sequence)
            progress = sequence.progress  # a new one if it had to be preempted
            self._reuse.after_eviction(slot, sequence.keys, progress.computed, progress.evictions)
            if progress.computed == len(prompt):
                progress.kept_tokens = self.kv.held_tokens(slot)
                if sequence.plan.decode_budget_tokens is None and not sequence.explain_plans:
                    self.kv.stop_observing(slot)
        self.kv.trim([sequence.slot for sequence in schedule.sequences if sequence.slot >= 0])

    def _evict_if_due(self, sequence: Sequence) -> None:
        decoded, plan = sequence.computed - len(sequence.prompt), sequence.plan
        held = self.kv.held_tokens(sequence.slot)
        if decoded <= 0 and plan.prefill_due(sequence.computed, held):
            self._evict(sequence, "prefill")
        elif decoded > 0 and plan.decode_due(decoded, held):
            self._evict(sequence, "decode")

    def _evict(self, sequence: Sequence, phase: Literal["prefill", "decode"]) -> None:
        """Evicts as the sequence's plan says; if pages that others share cannot be copied, it starts anew."""
        started, progress = time.perf_counter(), sequence.progress
        before = self.kv.held_tokens(sequence.slot)
        view = self.runner.attention.view(sequence.slot, sequence.plan.seed, phase, progress.evictions)
        indices, counts = select(view, sequence.plan, self.kv.kernels)
        try:
            pages_freed = evict(self.kv, sequence.slot, view, sequence.plan, indices, counts)
        except OutOfPages:
            return self.scheduler.preempt(sequence)
        progress.evictions += 1
        progress.decode_evictions += phase == "decode"
        kept = counts.double().mean().item()
        progress.evicted_tokens += before - kept
        self._report.evictions.append(
            EvictionStats(
                policy=sequence.plan.policy.name,
                phase=phase,
                tokens_evicted=round((before - kept) * counts.numel()),
                pages_freed=max(0, pages_freed),
                seconds=time.perf_counter() - started,
                kept_ratio=kept / before,
                head_budgets=counts.cpu().numpy(),
            )
        )

    def _fork(self, schedule: Schedule) -> list[tuple[Sequence, int]]:
        """Lets the further choices of a prompt share the pages of the first one.

        A choice that finds no room for its copy of the last pages is queued and prefills on its own.
        Sequences that were preempted within the step are left out.

        Returns:
            Sequences whose known tokens are all computed, and the row of the step's logits of each.
        """
        rows = zip(schedule.sequences, schedule.last_rows, strict=True)
        held = [(sequence, row) for sequence, row in rows if row is not None and sequence.slot >= 0]
        forked = list(held)
        for parent, row in held:
            forks, parent.forks = parent.forks, []
            for fork in forks:
                if self._share(parent, fork):
                    forked.append((fork, row))
                else:
                    self.scheduler.add(fork)
        return forked

    def _share(self, parent: Sequence, fork: Sequence) -> bool:
        if len(self.scheduler.running) >= self.kv.layout.max_sequences:
            return False
        try:
            fork.fork_from(parent, self.kv.fork(parent.slot))
        except OutOfPages:
            return False
        fork.peak_bytes = self.kv.sequence_bytes(fork.slot)
        self.scheduler.adopt(fork)
        return True

    def _sample(self, ready: list[tuple[Sequence, int]], logits: Tensor) -> None:
        """Gives each sequence its next token, or its end if it was only to compute its prompt."""
        silent = [sequence for sequence, _ in ready if not sequence.max_tokens]
        for sequence in silent:
            if not sequence.explain_plans:  # else it ends when they are explained
                self._end_silently(sequence)
        if silent:
            ready = [(sequence, row) for sequence, row in ready if sequence.max_tokens]
        if not ready:
            return
        sequences = [sequence for sequence, _ in ready]
        sampled = sample(logits[[row for _, row in ready]], sequences, self.eos_ids)
        now = time.monotonic()
        for sequence, token, logprob in zip(sequences, sampled.token_ids, sampled.logprobs, strict=True):
            sequence.output.append(token)
            sequence.token_times.append(now)
            stop = stop_after(sequence, token, self.eos_ids)
            report = self._finish(sequence, stop.reason) if stop.reason is not None else None
            self._report.outputs.append(token_output(sequence, token, logprob, stop, report))

    def _explain_next(self) -> None:
        """Asks one plan what it would keep of a prompt: one per step, so that decodes do not wait for all."""
        sequence = next((s for s in self.scheduler.running if s.remaining == 0), None)
        if sequence is None:
            return
        explanations = sequence.progress.explanations
        plan, view = sequence.explain_plans[len(explanations)], self.runner.attention.view(sequence.slot)
        explanations.append(explain(view, plan, self.kv.kernels, self.kv.page_bytes))
        if len(explanations) == len(sequence.explain_plans):
            self._end_silently(sequence)

    def _end_silently(self, sequence: Sequence) -> None:
        report = self._finish(sequence, "length")
        self._report.outputs.append(silent_output(sequence, report))

    def _finish(self, sequence: Sequence, reason: FinishReason) -> KVReport | None:
        """Takes a sequence out of the engine and reports what its cache held."""
        report = kv_report(self.kv, sequence)
        self.scheduler.remove(sequence)
        self._report.finish(sequence, reason, report)
        return report

    def _end_step(self, schedule: Schedule, started: float) -> list[Output]:
        """Hands out what is new, and learns how long it took."""
        report, self._report = self._report, StepReport()
        seconds = time.perf_counter() - started
        self.last_stats = stats = report.stats(self.kv, self.scheduler, schedule, seconds)
        if stats.generation_tokens:  # the host has waited for the device
            decodes = sum(schedule.chunks) - stats.prompt_tokens
            self.scheduler.pace.observe(decodes, stats.prompt_tokens, seconds)
        return report.outputs
