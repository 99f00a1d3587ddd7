"""The engine: one step at a time, schedule, run, evict, sample, report."""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from collections.abc import Hashable
from typing import Literal

from torch import Tensor

from curkv.cache.eviction import evict, select
from curkv.cache.explain import explain
from curkv.cache.integrity import check_integrity
from curkv.cache.options import EvictionOptions, OptionError
from curkv.cache.page_pool import OutOfPages
from curkv.cache.plan import EvictionPlan, resolve
from curkv.cache.prefixes import block_keys, context_digest
from curkv.engine.detokenizer import Detokenizer
from curkv.engine.runner import Runner
from curkv.engine.sampling import choice_seed, sample, token_logprobs
from curkv.engine.scheduler import Schedule, Scheduler
from curkv.engine.sequence import Sequence
from curkv.engine.stats import EvictionStats, RequestStats, SequenceStats, StepStats
from curkv.engine.structure import Structures
from curkv.engine.types import (
    FinishReason,
    InvalidRequest,
    KVReport,
    Output,
    Planned,
    Request,
    TokenLogprob,
    check_ids,
)
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
        self.scheduler = Scheduler(self.kv, max_step_tokens, max_itl)
        self.eos_ids = frozenset(info.end_ids(config.eos_token_ids, config.vocab_size))
        self._num_token_ids = info.num_token_ids(config.vocab_size)
        self.structures = Structures(info.tokenizer, config.vocab_size, sorted(self.eos_ids))
        self._order = itertools.count()
        self._outputs: list[Output] = []
        self._evictions: list[EvictionStats] = []
        self._finished: list[RequestStats] = []
        self.last_stats = self._stats(Schedule(), sampled=0, seconds=0.0)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self.scheduler.has_work

    def plan(self, request: Request) -> Planned:
        """Checks a request and resolves its eviction options; takes nothing. Any thread may call it.

        Raises:
            InvalidRequest: it could never be served as asked.
        """
        prompt, max_tokens = request.prompt_token_ids, self.max_tokens(request)
        if not prompt:
            raise InvalidRequest("the prompt is empty", "prompt")
        vocab = self._num_token_ids
        check_ids(prompt, vocab, "prompt")
        if request.sampling.max_tokens is None and max_tokens < 1:
            message = f"{len(prompt)} tokens leave no room in the context of {self.max_model_len} tokens"
            raise InvalidRequest(message, "prompt")
        if len(prompt) + max_tokens > self.max_model_len:
            raise InvalidRequest(
                f"prompt ({len(prompt)} tokens) + max_tokens ({max_tokens}) exceeds the context of "
                f"{self.max_model_len} tokens",
                "max_tokens" if len(prompt) < self.max_model_len else "prompt",
            )
        for field in ("logit_bias", "stop_token_ids"):
            check_ids(getattr(request.sampling, field), vocab, field)
        if request.sampling.min_tokens > max_tokens:
            raise InvalidRequest(f"is larger than max_tokens ({max_tokens})", "min_tokens")
        plan = self._resolve(request.eviction, prompt)
        self._check_pool(plan, max_tokens)
        candidates = tuple(self._resolve(options, prompt) for options in request.explain)
        matcher = None
        if request.sampling.structure is not None:
            if request.sampling.min_tokens:
                raise InvalidRequest("a structured output ends where its structure does", "min_tokens")
            matcher = self.structures.matcher(request.sampling.structure)
        return Planned(request, plan, candidates, matcher)

    def _resolve(self, options: EvictionOptions, prompt: list[int]) -> EvictionPlan:
        try:
            return resolve(options, prompt, self.kv.layout)
        except OptionError as error:
            raise InvalidRequest(error.message, f"kv.{error.field}") from error

    def max_tokens(self, request: Request) -> int:
        """Tokens the request may generate: what it asked for, else what the context has left."""
        asked = request.sampling.max_tokens
        return asked if asked is not None else self.max_model_len - len(request.prompt_token_ids)

    def _check_pool(self, plan: EvictionPlan, max_tokens: int) -> None:
        needed, pages = self.kv.footprint(plan, max(0, max_tokens - 1)), self.kv.num_pages
        if needed > pages:
            raise InvalidRequest(
                f"the request needs {needed} pages of KV cache at its peak, of {pages}: shorten it, lower "
                "its budget, choose prefill 'streaming', or start the server with a larger --kv-cache-memory",
                "prompt" if self.kv.footprint(plan, 0) > pages else "max_tokens",
            )

    def add(self, planned: Planned) -> None:
        """Queues a request; its further choices fork from the first one after prefill."""
        request, plan, matcher = planned.request, planned.eviction, planned.matcher
        sampling, prompt = request.sampling, request.prompt_token_ids
        seed = sampling.seed if sampling.seed is not None else secrets.randbits(64)
        blocks, context = self._prefix_keys(request, plan)
        first, *others = [
            Sequence(
                request=request,
                index=index,
                order=next(self._order),
                plan=plan,
                seed=choice_seed(seed, index),
                detokenizer=Detokenizer(
                    self.info.vocabulary, prompt, sampling.stop, sampling.skip_special_tokens
                ),
                matcher=matcher.deep_copy() if matcher is not None else None,
                candidates=planned.candidates,
                block_keys=blocks,
                context_key=context,
            )
            for index in range(sampling.n)
        ]
        first.forks = others
        self.scheduler.add(first)

    def _prefix_keys(self, request: Request, plan: EvictionPlan) -> tuple[list[bytes], Hashable | None]:
        """Under which keys prefixes of a prompt are held: its blocks, and its compressed context."""
        layout, most = self.kv.layout, self.kv.prefixes.max_pages
        if not most:
            return [], None
        prompt, salt, context = request.prompt_token_ids, request.cache_salt, None
        room = layout.sequence_pages(plan.budget_tokens, ragged=True, seen=plan.context_tokens) <= most
        if plan.reusable and room and request.sampling.prompt_logprobs is None:
            context = context_digest(prompt[: plan.context_tokens], salt), plan.options
        return block_keys(prompt, layout.page_size, salt), context

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
            reached = [c == s.remaining for s, c in zip(schedule.sequences, schedule.chunks, strict=True)]
            wanted = self._wanted_logits(schedule, reached)
            logits = self._run(schedule, wanted)
            last_rows = self._judge_prompts(schedule, wanted, logits)
            self._advance(schedule)
            ready = list(itertools.compress(zip(schedule.sequences, last_rows, strict=True), reached))
            self._sample(self._end_without_tokens(self._fork(ready)), logits)
        outputs, self._outputs = self._outputs, []
        sampled = sum(len(output.token_ids) for output in outputs)
        self.last_stats = self._stats(schedule, sampled, time.perf_counter() - started)
        if sampled:  # the host has waited for the device
            prompt_tokens = self.last_stats.prompt_tokens
            self.scheduler.pace.observe(
                sum(schedule.chunks) - prompt_tokens, prompt_tokens, self.last_stats.step_seconds
            )
        return outputs

    def fail(self, error: BaseException) -> list[Output]:
        """Ends every running sequence after a step that raised; their pages are freed, the queue stays."""
        logger.error("step failed: its requests end with an error", exc_info=error)
        outputs, self._outputs = self._outputs, []
        for sequence in list(self.scheduler.running):
            indices = [s.index for s in (sequence, *sequence.forks)]
            self._finish(sequence, "error")
            outputs += [Output(sequence.request.id, i, "", [], finish_reason="error") for i in indices]
        self.last_stats = self._stats(Schedule(), sampled=0, seconds=0.0)
        return outputs

    def check_integrity(self) -> None:
        """Checks the cache's invariants; called when the engine is idle."""
        check_integrity(self.kv)

    def _wanted_logits(self, schedule: Schedule, reached: list[bool]) -> list[int]:
        """Of how many last tokens of each chunk logits are wanted: to sample from, or to judge the prompt."""
        return [
            chunk if sequence.wants_prompt_logprobs else int(last)
            for sequence, chunk, last in zip(schedule.sequences, schedule.chunks, reached, strict=True)
        ]

    def _run(self, schedule: Schedule, wanted: list[int]) -> Tensor:
        """Computes the step's tokens; logits of the wanted ones."""
        sequences, chunks = schedule.sequences, schedule.chunks
        return self.runner.run(
            slots=[s.slot for s in sequences],
            tokens=[s.tokens(s.computed, c) for s, c in zip(sequences, chunks, strict=True)],
            starts=[s.computed for s in sequences],
            wanted=wanted,
        )

    def _judge_prompts(self, schedule: Schedule, wanted: list[int], logits: Tensor) -> list[int]:
        """Notes the log-probabilities of prompts that want them.

        Returns:
            The row of the logits that belongs to each sequence's last token of the step.
        """
        ends = list(itertools.accumulate(wanted))
        for sequence, count, end in zip(schedule.sequences, wanted, ends, strict=True):
            if sequence.wants_prompt_logprobs:
                following = sequence.prompt[sequence.computed + 1 : sequence.computed + 1 + count]
                rows = logits[end - count : end - count + len(following)]
                top = sequence.request.sampling.prompt_logprobs or 0
                sequence.prompt_logprobs += token_logprobs(rows, following, top)
        return [end - 1 for end in ends]

    def _advance(self, schedule: Schedule) -> None:
        """Counts the computed tokens and evicts where a sequence's plan says so."""
        for sequence, chunk in zip(schedule.sequences, schedule.chunks, strict=True):
            sequence.computed += chunk
            sequence.peak_bytes = max(sequence.peak_bytes, self.kv.sequence_bytes(sequence.slot))
            decoded, plan = sequence.computed - len(sequence.prompt), sequence.plan
            self._keep_blocks(sequence, chunk)
            held = self.kv.held_tokens(sequence.slot)
            if decoded <= 0 and plan.prefill_due(sequence.computed, held):
                self._evict(sequence, "prefill")
            elif decoded > 0 and plan.decode_due(decoded, held):
                self._evict(sequence, "decode")
            if sequence.context_key is not None and sequence.computed == plan.context_tokens:
                self.kv.keep(sequence.slot, sequence.context_key, sequence.computed, sequence.evictions)
            if sequence.computed == len(sequence.prompt):
                self._end_prompt(sequence)

    def _keep_blocks(self, sequence: Sequence, chunk: int) -> None:
        """Holds the blocks of the prompt that a sequence has just computed, before anything is evicted."""
        size, last = self.kv.layout.page_size, sequence.computed
        if not sequence.block_keys or last // size == (last - chunk) // size:
            return
        if last - chunk < sequence.lent_tokens:
            blocks = min(last, sequence.lent_tokens) // size
            self.kv.keep_blocks(sequence.slot, sequence.block_keys[:blocks], sequence.prompt)

    def _end_prompt(self, sequence: Sequence) -> None:
        sequence.kept_tokens = self.kv.held_tokens(sequence.slot)
        if sequence.plan.decode_budget_tokens is None and not sequence.candidates:
            self.kv.stop_observing(sequence.slot)

    def _explain_next(self) -> None:
        """Asks one plan what it would keep of a prompt: one per step, so that decodes do not wait for all."""
        sequence = next((s for s in self.scheduler.running if s.remaining == 0), None)
        if sequence is None:
            return
        plan = sequence.candidates[len(sequence.explanations)]
        view = self.runner.attention.view(sequence.slot)
        sequence.explanations.append(explain(view, plan, self.kv.kernels, self.kv.page_bytes))
        if len(sequence.explanations) == len(sequence.candidates):
            self._end_without_token(sequence)

    def _evict(self, sequence: Sequence, phase: Literal["prefill", "decode"]) -> None:
        """Evicts as the sequence's plan says; if pages that others share cannot be copied, it starts anew."""
        started = time.perf_counter()
        before = self.kv.held_tokens(sequence.slot)
        view = self.runner.attention.view(sequence.slot, sequence.plan.seed, phase, sequence.evictions)
        indices, counts = select(view, sequence.plan, self.kv.kernels)
        try:
            pages_freed = evict(self.kv, sequence.slot, view, sequence.plan, indices, counts)
        except OutOfPages:
            return self.scheduler.preempt(sequence)
        sequence.evictions += 1
        sequence.decode_evictions += phase == "decode"
        kept = counts.double().mean().item()
        sequence.evicted_tokens += before - kept
        self._evictions.append(
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

    def _fork(self, ready: list[tuple[Sequence, int]]) -> list[tuple[Sequence, int]]:
        """Lets the further choices of a prompt share the pages of the first one.

        A choice that finds no room for its copy of the last pages is queued and prefills on its own.
        Sequences that were preempted within the step are left out.

        Args:
            ready: sequences whose known tokens are all computed, and the row of the step's logits of each.

        Returns:
            The same with the forks.
        """
        held = [(sequence, row) for sequence, row in ready if sequence.slot >= 0]
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
            fork.slot = self.kv.fork(parent.slot)
        except OutOfPages:
            return False
        fork.computed, fork.first_scheduled = parent.computed, parent.first_scheduled
        fork.kept_tokens, fork.evicted_tokens = parent.kept_tokens, parent.evicted_tokens
        fork.evictions, fork.cached_tokens = parent.evictions, parent.cached_tokens
        fork.peak_bytes = self.kv.sequence_bytes(fork.slot)
        fork.prompt_logprobs = parent.prompt_logprobs
        self.scheduler.adopt(fork)
        return True

    def _end_without_tokens(self, ready: list[tuple[Sequence, int]]) -> list[tuple[Sequence, int]]:
        """Ends the sequences that were to compute their prompt and generate nothing; returns the others.

        A sequence that is to be explained ends later, see `_explain_next`.
        """
        silent = [sequence for sequence, _ in ready if self.max_tokens(sequence.request) == 0]
        for sequence in silent:
            if not sequence.candidates:
                self._end_without_token(sequence)
        return [(sequence, row) for sequence, row in ready if sequence not in silent] if silent else ready

    def _end_without_token(self, sequence: Sequence) -> None:
        self._outputs.append(
            Output(
                request_id=sequence.request.id,
                index=sequence.index,
                text="",
                token_ids=[],
                prompt_logprobs=sequence.reported_prompt_logprobs,
                explanations=sequence.explanations,
                finish_reason="length",
                kv=self._finish(sequence, "length"),
                cached_tokens=sequence.cached_tokens,
            )
        )

    def _sample(self, ready: list[tuple[Sequence, int]], logits: Tensor) -> None:
        if not ready:
            return
        sequences = [sequence for sequence, _ in ready]
        sampled = sample(logits[[row for _, row in ready]], sequences, self.eos_ids)
        now = time.monotonic()
        for sequence, token, logprob in zip(sequences, sampled.token_ids, sampled.logprobs, strict=True):
            sequence.output.append(token)
            sequence.token_times.append(now)
            self._outputs.append(self._output(sequence, token, logprob))

    def _output(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> Output:
        ended, reason, text = self._stopped_by(sequence, token)
        if ended is None and len(sequence.output) >= self.max_tokens(sequence.request):
            ended, text = "length", text + sequence.detokenizer.flush()
        return Output(
            request_id=sequence.request.id,
            index=sequence.index,
            text=text,
            token_ids=[token],
            logprobs=[logprob] if logprob is not None else None,
            prompt_logprobs=sequence.reported_prompt_logprobs if len(sequence.output) == 1 else None,
            finish_reason=ended,
            stop_reason=reason,
            problem=_structure_problem(sequence) if ended == "error" else None,
            kv=self._finish(sequence, ended) if ended is not None else None,
            cached_tokens=sequence.cached_tokens,
        )

    def _stopped_by(
        self, sequence: Sequence, token: int
    ) -> tuple[FinishReason | None, str | int | None, str]:
        """Whether a token ends its sequence, what ended it, and the text that it adds."""
        params, detokenizer, matcher = sequence.request.sampling, sequence.detokenizer, sequence.matcher
        if len(sequence.output) > params.min_tokens:
            if token in params.stop_token_ids:
                return "stop", token, detokenizer.flush()
            if token in self.eos_ids and not params.ignore_eos:
                return "stop", None, detokenizer.flush()
        text, stop = detokenizer.append(token, watch=len(sequence.output) > params.min_tokens)
        if stop is not None:
            return "stop", stop, text
        if matcher is not None and not (matcher.consume_token(token) and not matcher.is_stopped()):
            return ("error" if matcher.is_error() else "stop"), None, text + detokenizer.flush()
        return None, None, text

    def _finish(self, sequence: Sequence, reason: FinishReason) -> KVReport | None:
        """Takes a sequence out of the engine and reports what its cache held."""
        held = self.kv.sequence_bytes(sequence.slot) if sequence.slot >= 0 else 0
        report = sequence.report(held)
        self.scheduler.remove(sequence)
        for fork in sequence.forks:
            self._finished.append(_request_stats(fork, reason, None))
        self._finished.append(_request_stats(sequence, reason, report))
        return report

    def _stats(self, schedule: Schedule, sampled: int, seconds: float) -> StepStats:
        kv, usage = self.kv, self.kv.usage
        prompt_tokens = sum(
            min(s.computed, len(s.prompt)) - max(0, min(s.computed - c, len(s.prompt)))
            for s, c in zip(schedule.sequences, schedule.chunks, strict=True)
        )
        evictions, self._evictions = self._evictions, []
        finished, self._finished = self._finished, []
        return StepStats(
            running=len(self.scheduler.running),
            waiting=self.scheduler.num_waiting,
            used_pages=usage.used_pages,
            num_pages=usage.num_pages,
            used_bytes=usage.used_bytes,
            capacity_bytes=usage.capacity_bytes,
            stranded_slots_ratio=usage.stranded_slots_ratio,
            prefix_bytes=usage.prefix_bytes,
            prefix_saved_bytes=usage.saved_bytes,
            prefix_queries=sum(len(s.prompt) for s in schedule.admitted) if kv.prefixes.max_pages else 0,
            prefix_hits=sum(s.cached_tokens for s in schedule.admitted),
            prompt_tokens=prompt_tokens,
            generation_tokens=sampled,
            kv_tokens_written=sum(schedule.chunks) * kv.layout.num_heads,
            preemptions=schedule.preempted,
            evictions=evictions,
            started=[s.request.id for s in schedule.admitted],
            finished=finished,
            sequences=[self._sequence_stats(sequence) for sequence in self.scheduler.running],
            step_seconds=seconds,
        )

    def _sequence_stats(self, sequence: Sequence) -> SequenceStats:
        held = self.kv.sequence_bytes(sequence.slot)
        return SequenceStats(
            request_id=sequence.request.id,
            index=sequence.index,
            policy=sequence.plan.policy.name,
            prompt_tokens=len(sequence.prompt),
            computed_tokens=sequence.computed,
            generation_tokens=len(sequence.output),
            budget_tokens=sequence.plan.budget_tokens,
            held_tokens=self.kv.held_tokens(sequence.slot),
            held_bytes=held,
            peak_bytes=max(sequence.peak_bytes, held),
            owner=sequence.request.owner,
        )


def _structure_problem(sequence: Sequence) -> InvalidRequest:
    """Why the output of a sequence cannot go on as its structure wants."""
    structure, matcher = sequence.request.sampling.structure, sequence.matcher
    assert structure is not None and matcher is not None
    reason = matcher.get_error().partition("\n")[0]
    return InvalidRequest(f"the output cannot be continued: {reason}", structure.param)


def _request_stats(sequence: Sequence, reason: FinishReason, report: KVReport | None) -> RequestStats:
    now = time.monotonic()
    arrival, times = sequence.request.arrival_time, sequence.token_times
    scheduled = sequence.first_scheduled if sequence.first_scheduled is not None else now
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
    )
