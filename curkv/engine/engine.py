"""The engine: one step at a time, schedule, run, evict, sample, report."""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from collections.abc import Mapping
from typing import Any, Literal

from tokenizers import Tokenizer
from torch import Tensor

from curkv.cache.batch import Batch
from curkv.cache.eviction import plan_kept
from curkv.cache.kv_cache import KVCache
from curkv.cache.options import EvictionPlan, OptionError, resolve
from curkv.cache.page_pool import OutOfPages
from curkv.engine.decode_graphs import DecodeGraphs
from curkv.engine.detokenizer import Detokenizer
from curkv.engine.sampling import choice_seed, sample
from curkv.engine.scheduler import Schedule, Scheduler
from curkv.engine.sequence import Sequence
from curkv.engine.stats import EvictionStats, RequestStats, StepStats
from curkv.engine.types import FinishReason, InvalidRequest, KVReport, Output, Request, TokenLogprob
from curkv.kernels.dispatch import Kernels
from curkv.models.llama import Llama

logger = logging.getLogger(__name__)


class Engine:
    """Runs requests over one model and one cache. Not thread-safe: one thread calls `add`, `abort`, `step`.

    Args:
        model: the model.
        kv: its cache.
        kernels: operations that score and select what the cache keeps.
        tokenizer: turns token ids into text.
        max_step_tokens: most tokens of one step; long prompts are prefilled in chunks of at most this size.
        max_model_len: most tokens of prompt and output together.
        decode_graphs: runs the steps that only decode, if given.
        pruning: how the model was pruned, if it was; see `load_pruning`.
    """

    def __init__(
        self,
        model: Llama,
        kv: KVCache,
        kernels: Kernels,
        tokenizer: Tokenizer,
        max_step_tokens: int,
        max_model_len: int,
        decode_graphs: DecodeGraphs | None = None,
        pruning: Mapping[str, Any] | None = None,
    ):
        self.model = model
        self.kv = kv
        self.kernels = kernels
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.decode_graphs = decode_graphs
        self.pruning = pruning
        self.scheduler = Scheduler(kv, max_step_tokens)
        self.eos_ids = frozenset(model.config.eos_token_ids)
        self._order = itertools.count()
        self._outputs: list[Output] = []
        self._evictions: list[EvictionStats] = []
        self._finished: list[RequestStats] = []
        self.last_stats = self._stats(Schedule(), sampled=0, seconds=0.0)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self.scheduler.has_work

    def plan(self, request: Request) -> EvictionPlan:
        """Checks a request and resolves its eviction options; takes nothing.

        Raises:
            InvalidRequest: it could never be served as asked.
        """
        prompt, max_tokens = request.prompt_token_ids, self.max_tokens(request)
        if not prompt:
            raise InvalidRequest("the prompt is empty", "prompt")
        vocab = self.model.config.vocab_size
        bad = next((i for i in prompt if not 0 <= i < vocab), None)
        if bad is not None:
            raise InvalidRequest(f"token id {bad} is outside the vocabulary 0..{vocab - 1}", "prompt")
        if len(prompt) + max_tokens > self.max_model_len or max_tokens < 1:
            raise InvalidRequest(
                f"prompt ({len(prompt)} tokens) + max_tokens ({max_tokens}) exceeds the context of "
                f"{self.max_model_len} tokens",
                "max_tokens" if len(prompt) < self.max_model_len else "prompt",
            )
        unknown = [i for i in request.sampling.logit_bias if not 0 <= i < vocab]
        if unknown:
            raise InvalidRequest(f"token id {unknown[0]} is outside the vocabulary of {vocab}", "logit_bias")
        try:
            plan = resolve(request.eviction, prompt, self.kv.layout)
        except OptionError as error:
            raise InvalidRequest(error.message, f"kv.{error.field}") from error
        self._check_pool(plan, len(prompt), max_tokens)
        return plan

    def max_tokens(self, request: Request) -> int:
        """Tokens the request may generate: what it asked for, else what the context has left."""
        asked = request.sampling.max_tokens
        return asked if asked is not None else self.max_model_len - len(request.prompt_token_ids)

    def _check_pool(self, plan: EvictionPlan, prompt_tokens: int, max_tokens: int) -> None:
        held = plan.budget_tokens + max_tokens
        if plan.decode_budget_tokens is not None:
            held = min(
                held, max(plan.decode_budget_tokens, plan.budget_tokens) + plan.options.decode_interval
            )
        ragged = plan.policy.allocation == "adaptive"
        slack = self.kv.layout.num_heads if ragged and held > prompt_tokens else 0
        needed = self.kv.layout.sequence_pages(max(prompt_tokens, held)) + slack
        if needed > self.kv.num_pages:
            raise InvalidRequest(
                f"the request needs {needed} pages of KV cache at its peak, of {self.kv.num_pages}: "
                "shorten it, lower its budget, or start the server with a larger --kv-cache-memory",
                "prompt"
                if self.kv.layout.sequence_pages(prompt_tokens) > self.kv.num_pages
                else "max_tokens",
            )

    def add(self, request: Request, plan: EvictionPlan) -> None:
        """Queues a planned request; its further choices fork from the first one after prefill."""
        seed = request.sampling.seed if request.sampling.seed is not None else secrets.randbits(64)
        first, *others = [
            Sequence(
                request=request,
                index=index,
                order=next(self._order),
                plan=plan,
                seed=choice_seed(seed, index),
                detokenizer=Detokenizer(self.tokenizer, request.prompt_token_ids, request.sampling.stop),
            )
            for index in range(request.sampling.n)
        ]
        first.forks = others
        self.scheduler.add(first)

    def abort(self, request_id: str) -> None:
        """Ends a request wherever it is and frees its pages; unknown ids are ignored."""
        for sequence in self.scheduler.find(request_id):
            self._finish(sequence, "abort")

    def step(self) -> list[Output]:
        """Advances every scheduled sequence by its tokens and returns what is new."""
        started = time.perf_counter()
        schedule = self.scheduler.schedule()
        if schedule.sequences:
            batch, reached = self._batch(schedule)
            logits = self._forward(batch)
            self._advance(schedule)
            self._sample(*self._fork(reached), logits)
        outputs, self._outputs = self._outputs, []
        self.last_stats = self._stats(schedule, len(outputs), time.perf_counter() - started)
        return outputs

    def fail(self, error: BaseException) -> list[Output]:
        """Ends every running sequence after a step that raised; their pages are freed, the queue stays."""
        logger.error("step failed: its requests end with an error", exc_info=error)
        outputs, self._outputs = self._outputs, []
        for sequence in list(self.scheduler.running):
            indices = [s.index for s in (sequence, *sequence.forks)]
            self._finish(sequence, "error")
            outputs += [Output(sequence.request.id, i, "", [], finish_reason="error") for i in indices]
        return outputs

    def check_integrity(self) -> None:
        """Checks the cache's invariants; called when the engine is idle."""
        self.kv.check_integrity()

    def _batch(self, schedule: Schedule) -> tuple[Batch, list[Sequence]]:
        """The step's flattened tokens, and the sequences whose last token they reach."""
        sequences, chunks = schedule.sequences, schedule.chunks
        reached = [c == s.remaining for s, c in zip(sequences, chunks, strict=True)]
        batch = Batch.build(
            slots=[s.slot for s in sequences],
            token_ids=[s.tokens(s.computed, c) for s, c in zip(sequences, chunks, strict=True)],
            starts=[s.computed for s in sequences],
            sampled=reached,
            device=self.kv.device,
        )
        return batch, list(itertools.compress(sequences, reached))

    def _forward(self, batch: Batch) -> Tensor:
        """Logits of the batch's wanted rows."""
        if self.decode_graphs is not None and batch.num_decodes == len(batch.slots):
            return self.decode_graphs.forward(batch)
        return self.model.forward(batch, self.kv)

    def _advance(self, schedule: Schedule) -> None:
        """Counts the computed tokens and evicts where a sequence's plan says so."""
        for sequence, chunk in zip(schedule.sequences, schedule.chunks, strict=True):
            sequence.computed += chunk
            sequence.peak_bytes = max(sequence.peak_bytes, self.kv.sequence_bytes(sequence.slot))
            decoded = sequence.computed - len(sequence.prompt)
            if decoded == 0:
                self._evict_prompt(sequence)
            elif decoded > 0 and sequence.plan.decode_due(decoded, self._mean_length(sequence)):
                self._evict_decode(sequence)

    def _evict_prompt(self, sequence: Sequence) -> None:
        if sequence.plan.evicts_prompt:
            self._evict(sequence, "prefill")
        sequence.kept_tokens = self._mean_length(sequence)

    def _evict_decode(self, sequence: Sequence) -> None:
        try:
            self._evict(sequence, "decode")
            sequence.decode_evictions += 1
        except OutOfPages:  # pages shared with another choice cannot be copied: recompute without sharing
            self.scheduler.preempt(sequence)

    def _evict(self, sequence: Sequence, phase: Literal["prefill", "decode"]) -> None:
        started = time.perf_counter()
        before = self._mean_length(sequence)
        view = self.kv.view(sequence.slot, sequence.plan.seed, phase, sequence.decode_evictions)
        indices, counts = plan_kept(view, sequence.plan, self.kernels)
        pages_freed = self.kv.evict(sequence.slot, indices, counts)
        kept = counts.double().mean().item()
        sequence.evicted_tokens += before - kept
        self._evictions.append(
            EvictionStats(
                policy=sequence.plan.policy.name,
                phase=phase,
                tokens_evicted=round((before - kept) * counts.numel()),
                pages_freed=pages_freed,
                seconds=time.perf_counter() - started,
                kept_ratio=kept / before,
                head_budgets=counts.cpu().numpy(),
            )
        )

    def _mean_length(self, sequence: Sequence) -> float:
        """Tokens that a head of the sequence holds, on average."""
        return self.kv.sequence_tokens(sequence.slot) / self.kv.layout.num_heads

    def _fork(self, sampled: list[Sequence]) -> tuple[list[Sequence], list[int]]:
        """Lets the further choices of a prompt share the pages of the first one.

        A choice that finds no room for its copy of the last pages is queued and prefills on its own.
        Sequences that were preempted within the step are left out.

        Returns:
            The sequences to sample, and the row of the step's logits of each.
        """
        held = [(row, sequence) for row, sequence in enumerate(sampled) if sequence.slot >= 0]
        rows, sequences = [row for row, _ in held], [sequence for _, sequence in held]
        for row, parent in held:
            forks, parent.forks = parent.forks, []
            for fork in forks:
                if self._share(parent, fork):
                    sequences.append(fork)
                    rows.append(row)
                else:
                    self.scheduler.add(fork)
        return sequences, rows

    def _share(self, parent: Sequence, fork: Sequence) -> bool:
        if len(self.scheduler.running) >= self.kv.layout.max_sequences:
            return False
        try:
            fork.slot = self.kv.fork(parent.slot)
        except OutOfPages:
            return False
        fork.computed, fork.first_scheduled = parent.computed, parent.first_scheduled
        fork.kept_tokens, fork.evicted_tokens = parent.kept_tokens, parent.evicted_tokens
        fork.peak_bytes = self.kv.sequence_bytes(fork.slot)
        self.scheduler.adopt(fork)
        return True

    def _sample(self, sequences: list[Sequence], rows: list[int], logits: Tensor) -> None:
        if not sequences:
            return
        sampled = sample(logits[rows], sequences, self.eos_ids)
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
            finish_reason=ended,
            stop_reason=reason,
            kv=self._finish(sequence, ended) if ended is not None else None,
        )

    def _stopped_by(
        self, sequence: Sequence, token: int
    ) -> tuple[FinishReason | None, str | int | None, str]:
        """Whether a token ends its sequence, what ended it, and the text that it adds."""
        params, detokenizer = sequence.request.sampling, sequence.detokenizer
        if len(sequence.output) > params.min_tokens:
            if token in params.stop_token_ids:
                return "stop", token, detokenizer.flush()
            if token in self.eos_ids and not params.ignore_eos:
                return "stop", None, detokenizer.flush()
        text, stop = detokenizer.append(token, watch=len(sequence.output) > params.min_tokens)
        return ("stop" if stop is not None else None), stop, text

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
        kv = self.kv
        prompt_tokens = sum(
            min(s.computed, len(s.prompt)) - max(0, min(s.computed - c, len(s.prompt)))
            for s, c in zip(schedule.sequences, schedule.chunks, strict=True)
        )
        evictions, self._evictions = self._evictions, []
        finished, self._finished = self._finished, []
        return StepStats(
            running=len(self.scheduler.running),
            waiting=self.scheduler.num_waiting,
            used_pages=kv.used_pages,
            num_pages=kv.num_pages,
            used_bytes=kv.used_bytes,
            capacity_bytes=kv.capacity_bytes,
            stranded_slots_ratio=kv.stranded_slots_ratio,
            prompt_tokens=prompt_tokens,
            generation_tokens=sampled,
            kv_tokens_written=sum(schedule.chunks) * kv.layout.num_heads,
            preemptions=schedule.preempted,
            evictions=evictions,
            finished=finished,
            step_seconds=seconds,
        )


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
