"""The engine: one step at a time, schedule, run, evict, sample, report."""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from curkv.cache.explain import explain
from curkv.cache.integrity import check_integrity
from curkv.cache.options import EvictionOptions
from curkv.cache.page_pool import OutOfPages
from curkv.cache.reuse import SESSION_TTL, PrefixReuse, ReuseKeys
from curkv.cache.sessions import SessionName, SessionStats, shaped_by
from curkv.cache.store import Store
from curkv.cache.upload import upload_list
from curkv.engine.detokenizer import Detokenizer
from curkv.engine.evictions import Evictions
from curkv.engine.faults import EngineBroken, Faults
from curkv.engine.planning import Planner
from curkv.engine.reporting import StepReport, kv_report, silent_output, token_output
from curkv.engine.runner import Runner
from curkv.engine.sampling import choice_seed, sample, token_logprobs
from curkv.engine.scheduler import Schedule, Scheduler
from curkv.engine.sequence import Sequence, observed_of
from curkv.engine.stopping import stop_after
from curkv.engine.structure import Structures
from curkv.engine.types import (
    EngineFault,
    FinishReason,
    KVReport,
    Output,
    Planned,
    Request,
    SamplingParams,
    TokenLogprob,
)
from curkv.models.info import ModelInfo

logger = logging.getLogger(__name__)


def drawn_seed() -> int:
    """A seed for a request that has none."""
    return secrets.randbits(64)


class Engine:
    """Runs requests over one model and one cache. Not thread-safe: one thread calls `add`, `abort`, `step`.

    What raises in a step ends those at fault and nobody else. A phase over several sequences is tried again
    with each alone; what raises for a single sequence has it computed anew, and ends it the second time, or
    at once where it was alone already or its text cannot be made again. After a step with a fault the cache's
    books are checked; if they do not agree any more, everything in it is computed anew.

    Args:
        runner: the model over its cache.
        info: its tokenizer, and what the server wants to know of it.
        max_step_tokens: most tokens of one step; long prompts are prefilled in chunks of at most this size.
        max_model_len: most tokens of prompt and output together.
        max_itl: seconds that a step with running decodes may take, see `Pace`.
        reuse_generated: generated tokens are cached for prompts to come, see `PrefixReuse`.
        session_ttl: seconds after its last use at which a session is dropped.
    """

    def __init__(
        self,
        runner: Runner,
        info: ModelInfo,
        max_step_tokens: int,
        max_model_len: int,
        max_itl: float | None = None,
        reuse_generated: bool = False,
        session_ttl: float = SESSION_TTL,
    ):
        config = runner.model.config
        self.runner = runner
        self.kv = runner.kv
        self.info = info
        self.max_model_len = max_model_len
        self.eos_ids = frozenset(info.end_ids(config.eos_token_ids, config.vocab_size))
        self.structures = Structures(info.tokenizer, config.vocab_size, sorted(self.eos_ids))
        self._reuse = PrefixReuse(self.kv, reuse_generated, session_ttl)
        self.scheduler = Scheduler(self.kv, self._reuse, max_step_tokens, max_itl)
        self.num_token_ids = info.num_token_ids(config.vocab_size)
        self._planner = Planner(self.kv, self.num_token_ids, self.structures, max_model_len)
        self._order = itertools.count()
        self._faults = Faults(self.scheduler.preempt, self._fail, alone=self.kv.ranks.size == 1)
        self._evictions = Evictions(runner, info, self.scheduler, self._reuse, self._faults)
        self._report = StepReport()
        self.last_stats = self._report.stats(self.kv, self._reuse, self.scheduler, Schedule(), seconds=0.0)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self.scheduler.has_work or self._reuse.unwritten

    @property
    def max_kv_tokens(self) -> int:
        """Most tokens of a request that keeps all of them: the context, or what the cache has pages for."""
        return min(self.max_model_len, self.kv.layout.sequence_tokens(self.kv.num_pages))

    def plan(self, request: Request) -> Planned:
        """Checks a request and resolves its eviction options; takes nothing. Any thread may call it.

        Raises:
            InvalidRequest: it could never be served as asked.
        """
        planned = self._planner.plan(request)
        keys, judged = self._keys(planned), request.sampling.reads_all
        return replace(planned, keys=keys, read=self._reuse.read(keys, request.prompt_token_ids, judged))

    def _keys(self, planned: Planned) -> ReuseKeys:
        request = planned.request
        name = SessionName(request.owner, request.session) if request.session else None
        return self._reuse.keys(
            request.prompt_token_ids,
            planned.eviction,
            observed_of(planned.eviction, planned.explain_plans),
            request.cache_salt,
            judged=request.sampling.reads_all,
            session=name,
            shaped_by=shaped_by(request.eviction, request.cache_salt) if name is not None else "",
            tenant=request.tenant,
            context_ttl=request.context_ttl,
        )

    def add(self, planned: Planned) -> None:
        """Queues a request; its further choices fork from the first one after prefill."""
        first, *others = self._sequences(planned)
        first.forks, first.read = others, planned.read
        self.scheduler.add(first)

    def _sequences(self, planned: Planned) -> list[Sequence]:
        """A sequence for each choice of a request."""
        request, plan, matcher = planned.request, planned.eviction, planned.matcher
        sampling, prompt = request.sampling, request.prompt_token_ids
        seed = sampling.seed if sampling.seed is not None else drawn_seed()
        return [
            Sequence(
                request=request,
                index=index,
                order=next(self._order),
                plan=plan,
                seed=choice_seed(seed, index),
                max_tokens=planned.max_tokens,
                detokenizer=Detokenizer(
                    self.info.vocabulary,
                    prompt,
                    sampling.stop,
                    sampling.skip_special_tokens,
                    sampling.include_stop,
                ),
                matcher=matcher.deep_copy() if matcher is not None else None,
                explain_plans=planned.explain_plans,
                keys=planned.keys,
            )
            for index in range(sampling.n)
        ]

    def drop_prefixes(self, tenant: str = "") -> int:
        """Drops the prefixes that no running sequence uses, but for sessions; returns the bytes freed.

        Args:
            tenant: whose they are; "": everybody's.
        """
        try:
            return self._reuse.drop_prefixes(tenant) * self.kv.page_bytes
        except Exception as error:
            self._faults.note(error, phase="free")
            self._recover()
            raise

    def sessions(self, owner: str) -> list[SessionStats]:
        """The sessions of an API key that can go on, the one used last first."""
        return self._reuse.sessions.told(owner, self.kv.page_bytes)

    def drop_session(self, owner: str, name: str, tenant: str = "") -> int | None:
        """Drops a session; returns the bytes freed, or None if there is none of that name."""
        pages = self._reuse.drop_session(SessionName(owner, name), tenant)
        return None if pages is None else pages * self.kv.page_bytes

    def keep_on_disk(self, store: Store) -> None:
        """Keeps copies of prefixes and sessions from now on, and reads those that are there."""
        self._reuse.keep_on_disk(store)

    def watch(self, lost: Callable[[EngineBroken], object]) -> None:
        """Calls `lost`, from a thread of its own, when another process ends that the engine needs."""

    def close(self, timeout: float) -> None:
        """Writes what is to be kept on disk, for so many seconds at most; nothing runs any more."""
        while self._reuse.unwritten:
            self._reuse.write_some()
        if self._reuse.store is not None:
            self._reuse.store.close(timeout)

    def abort(self, request_id: str) -> None:
        """Ends a request wherever it is and frees its pages; unknown ids are ignored."""
        for sequence in self.scheduler.find(request_id):
            self._finish(sequence, "abort")
        self._recover()

    def step(self) -> list[Output]:
        """Advances every scheduled sequence by its tokens and returns what is new.

        Raises:
            EngineBroken: the device is lost.
        """
        started, schedule = time.perf_counter(), Schedule()
        try:
            self._explain_next()
            self._evictions.repeat_next()
            started = time.perf_counter()
            schedule = self._schedule()
            if schedule.sequences:
                schedule, logits = self._run(schedule)
                self._judge_prompts(schedule, logits)
                self._advance(schedule, logits)
                self._sample(self._fork(schedule), logits)
        except EngineBroken:
            raise
        except Exception as error:  # nobody's: where it struck, no sequence was at work
            self._faults.note(error)
            self._faults.unexplained = True
            self.scheduler.restart()
        self._recover()
        return self._end_step(schedule, started)

    def check_faults(self) -> None:
        """Checks that steps do not fail again and again for no fault of the requests; called after each.

        Raises:
            EngineBroken: they do.
        """
        self._faults.check(self._works)

    def _works(self) -> bool:
        """Whether a token can be computed, if there is room for it."""
        request = Request("probe", [0], SamplingParams(max_tokens=1, temperature=0), EvictionOptions())
        try:
            [probe] = self._sequences(self.plan(request))
            self.scheduler.add(probe)
            try:
                schedule = self.scheduler.schedule(alone=probe)
                if schedule.sequences:
                    sample(self._forward(schedule), [probe], self.eos_ids)
            finally:
                self.scheduler.remove(probe)
        except Exception:
            logger.exception("a request of the engine's own failed too")
            return False
        return True

    def check_integrity(self) -> None:
        """Checks the cache's invariants; called when the engine is idle."""
        check_integrity(self.kv)

    def _fail(self, sequence: Sequence, fault: EngineFault) -> None:
        """Ends a sequence with an error, and the choices that were to share its prompt."""
        for choice in (sequence, *sequence.forks):
            news = Output(sequence.request.id, choice.index, "", [], finish_reason="error", problem=fault)
            self._report.outputs.append(news)
        self._finish(sequence, "error")

    def _recover(self) -> None:
        """Cleans up after faults: frees what nobody holds, and the whole cache if its books do not agree."""
        if not self._faults.noted:
            return
        try:
            for slot in set(self.kv.active_slots) - {s.slot for s in self.scheduler.running}:
                self.kv.free(slot)
            check_integrity(self.kv)
        except Exception as error:
            self._faults.note(error, phase="free")
            logger.error("the cache's books do not agree after a fault: all of it is computed anew")
            self.scheduler.restart()
            self.kv.clear()

    def _schedule(self) -> Schedule:
        """Picks the step's work; if that raises, every sequence that it looked at is tried alone."""
        self._faults.phase = "schedule"
        try:
            return self.scheduler.schedule()
        except Exception as error:
            self._faults.note(error)
        guilty = False
        for sequence in self.scheduler.candidates:
            try:
                self.scheduler.schedule(alone=sequence)
            except Exception as error:
                guilty, self._faults.phase = True, "schedule" if sequence.slot >= 0 else "start"
                self._faults.blame(sequence, error, again=False)
        self._faults.phase = "schedule"
        try:
            return self.scheduler.schedule()
        except Exception as error:
            self._faults.note(error)
            self._faults.unexplained |= not guilty
            return Schedule()

    def _run(self, schedule: Schedule) -> tuple[Schedule, Tensor]:
        """Computes the step's tokens; if that raises, those of each sequence alone.

        One for which there are no pages after all is computed anew when there are, unless it is alone.

        Returns:
            The step as far as it was computed, and the logits that its `wanted` counts.
        """
        self._faults.phase = "forward"
        mark = self.kv.mark([s.slot for s in schedule.sequences])
        try:
            return schedule, self._forward(schedule)
        except Exception as error:
            self.kv.retract(mark)
            short = isinstance(error, OutOfPages)  # of which nobody is guilty
            if not short:
                self._faults.note(error)
        computed, logits = [], []
        for index, sequence in enumerate(schedule.sequences):
            mark = self.kv.mark([sequence.slot])
            try:
                logits.append(self._forward(schedule.only([index])).clone())
                computed.append(index)
            except Exception as error:
                self.kv.retract(mark)
                if isinstance(error, OutOfPages) and len(self.scheduler.running) > 1:
                    self.scheduler.preempt(sequence)
                else:
                    self._faults.blame(sequence, error, again=False)
        self._faults.unexplained |= not short and len(computed) == len(schedule.sequences)
        return schedule.only(computed), torch.cat(logits) if logits else torch.empty(0)

    def _forward(self, schedule: Schedule) -> Tensor:
        sequences, chunks = schedule.sequences, schedule.chunks
        slots, starts = [s.slot for s in sequences], [s.computed for s in sequences]
        tokens = [s.tokens(s.computed, c) for s, c in zip(sequences, chunks, strict=True)]
        if not any(s.request.sampling.embed for s in sequences):
            return self.runner.run(slots, tokens, starts, schedule.wanted)
        logits, states = self.runner.run_with_states(slots, tokens, starts, schedule.wanted)
        for sequence, chunk in zip(sequences, states.split_with_sizes(chunks), strict=True):
            if sequence.request.sampling.embed:
                sequence.chunk_states = chunk.sum(0)
        return logits

    def _judge_prompts(self, schedule: Schedule, logits: Tensor) -> None:
        """Notes the log-probabilities of prompts that want them."""
        self._faults.phase = "prompt_logprobs"
        ends = itertools.accumulate(schedule.wanted)
        for sequence, count, end in zip(schedule.sequences, schedule.wanted, ends, strict=True):
            if sequence.wants_prompt_logprobs:
                following = sequence.prompt[sequence.computed + 1 : sequence.computed + 1 + count]
                rows = logits[end - count : end - count + len(following)]
                top = sequence.request.sampling.prompt_logprobs or 0
                try:
                    sequence.progress.prompt_logprobs += token_logprobs(rows, following, top)
                except Exception as error:
                    self._faults.blame(sequence, error)

    def _advance(self, schedule: Schedule, logits: Tensor) -> None:
        """Counts the computed tokens, and holds and evicts where a sequence's plan says so."""
        ends = itertools.accumulate(schedule.wanted)
        for sequence, chunk, end in zip(schedule.sequences, schedule.chunks, ends, strict=True):
            self._faults.for_one(sequence, "prefix", self._count, chunk, logits[max(0, end - 1) : end])
        self._evictions.evict_due(schedule.sequences)
        for sequence in schedule.sequences:
            self._faults.for_one(sequence, "prefix", self._after_evictions)
        self._faults.phase = "trim"
        self.kv.trim([sequence.slot for sequence in schedule.sequences if sequence.slot >= 0])

    def _count(self, sequence: Sequence, chunk: int, last: Tensor) -> None:
        """Counts the computed tokens of a sequence, and holds their pages for others.

        Args:
            sequence: the sequence.
            chunk: tokens that were computed.
            last: logits of the last one, [1, vocab], if they were wanted.
        """
        progress = sequence.progress
        if sequence.drafts_behind(chunk):
            progress.following = last.argmax(-1)
        start, progress.computed = progress.computed, progress.computed + chunk
        if (states := sequence.chunk_states) is not None:
            progress.states = states if progress.states is None else progress.states + states
        sequence.peak_bytes = max(sequence.peak_bytes, self.kv.sequence_bytes(sequence.slot))
        if progress.shareable and not progress.evictions:
            self._reuse.after_chunk(sequence.slot, sequence.keys, sequence.prompt, start, sequence.computed)

    def _after_evictions(self, sequence: Sequence) -> None:
        """Caches what is compressed now, and ends what a prompt alone needs."""
        self._evictions.hold_compressed(sequence)
        if sequence.computed == len(sequence.prompt):
            sequence.progress.kept_tokens = self.kv.held_tokens(sequence.slot)
            if not sequence.observes_answer:
                self.kv.stop_observing(sequence.slot)

    def _fork(self, schedule: Schedule) -> list[tuple[Sequence, int]]:
        """Lets the further choices of a prompt share the pages of the first one.

        A choice that finds no room for its copy of the last pages is queued and prefills on its own.
        Sequences that were preempted within the step are left out.

        Returns:
            Sequences whose known tokens are all computed, and the row of the step's logits of each.
        """
        self._faults.phase = "fork"
        rows = zip(schedule.sequences, schedule.last_rows, strict=True)
        held = [(sequence, row) for sequence, row in rows if row is not None and sequence.slot >= 0]
        forked = list(held)
        for parent, row in held:
            forks, parent.forks = parent.forks, []
            for fork in forks:
                if self._share(parent, fork):
                    forked.append((fork, row))
                else:
                    fork.reset()
                    self.scheduler.add(fork)
        return forked

    def _share(self, parent: Sequence, fork: Sequence) -> bool:
        if len(self.scheduler.running) >= self.kv.layout.max_sequences:
            return False
        try:
            fork.fork_from(parent, self.kv.fork(parent.slot))
            fork.peak_bytes = self.kv.sequence_bytes(fork.slot)
        except OutOfPages:
            return False
        except Exception as error:
            self._faults.note(error)
            return False
        self.scheduler.adopt(fork)
        return True

    def _sample(self, ready: list[tuple[Sequence, int]], logits: Tensor) -> None:
        """Gives each sequence its next token, or its end if it was only to compute its prompt."""
        for sequence, _ in ready:
            if not sequence.max_tokens and not sequence.explain_plans:  # else it ends when they are explained
                try:
                    self._end_silently(sequence)
                except Exception as error:
                    self._faults.blame(sequence, error, again=False)
        ready = [(sequence, row) for sequence, row in ready if sequence.max_tokens]
        if not ready:
            return
        for sequence, token, logprob in self._choose(ready, logits):
            try:
                self._take(sequence, token, logprob)
            except Exception as error:
                self._faults.blame(sequence, error, again=False)

    def _choose(
        self, ready: list[tuple[Sequence, int]], logits: Tensor
    ) -> list[tuple[Sequence, int, TokenLogprob | None]]:
        """Chooses a token for each sequence; if that raises, for each alone."""
        self._faults.phase = "sample"
        sequences = [sequence for sequence, _ in ready]
        try:
            sampled = sample(
                logits[upload_list((row for _, row in ready), logits.device)], sequences, self.eos_ids
            )
            told = self.kv.ranks.told(sampled.token_ids)
            return list(zip(sequences, told, sampled.logprobs, strict=True))
        except Exception as error:
            self._faults.note(error)
        chosen = []
        for sequence, row in ready:
            try:
                sampled = sample(logits[row : row + 1].clone(), [sequence], self.eos_ids)
                chosen.append((sequence, sampled.token_ids[0], sampled.logprobs[0]))
            except Exception as error:
                self._faults.blame(sequence, error, again=False)
        self._faults.unexplained |= len(chosen) == len(ready)
        return chosen

    def _take(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> None:
        """Adds a token to a sequence, and ends it if it is the last one."""
        self._faults.phase = "detokenize"
        sequence.output.append(token)
        sequence.token_times.append(time.monotonic())
        stop = stop_after(sequence, token, self.eos_ids)
        self._faults.phase = "report"
        report = kv_report(self.kv, sequence) if stop.reason is not None else None
        output = token_output(sequence, token, logprob, stop, report)
        if stop.reason is not None:
            self._finish(sequence, stop.reason, report)
        self._report.outputs.append(output)

    def _explain_next(self) -> None:
        """Asks one plan what it would keep of a prompt: one per step, so that decodes do not wait for all."""
        self._faults.phase = "explain"
        sequence = next((s for s in self.scheduler.running if s.remaining == 0), None)
        if sequence is None:
            return
        try:
            explanations, repetition = sequence.progress.explanations, sequence.progress.repetition
            plan = sequence.explain_plans[len(explanations)]
            draft = self._evictions.draft(sequence, plan)
            view = replace(self.runner.attention.view(sequence.slot), draft=draft)
            if plan.needs.repetition:
                if repetition is None:
                    self._evictions.repeat(sequence)
                if repetition is None or not repetition.done:
                    return
                view = replace(view, repetition=repetition.scores)
            explanations.append(explain(view, plan, self.kv.kernels, self.kv.page_bytes))
            if len(explanations) == len(sequence.explain_plans):
                self._end_silently(sequence)
        except OutOfPages:  # others have taken the room for a draft
            self.scheduler.preempt(sequence)
        except Exception as error:
            self._faults.blame(sequence, error)

    def _end_silently(self, sequence: Sequence) -> None:
        self._faults.phase = "report"
        report = kv_report(self.kv, sequence)
        output = silent_output(sequence, report)
        self._finish(sequence, "length", report)
        self._report.outputs.append(output)

    def _finish(self, sequence: Sequence, reason: FinishReason, report: KVReport | None = None) -> None:
        """Takes a sequence out of the engine; what it leaves may be gone on from."""
        if reason != "error" and sequence.progress.kept_tokens is not None and sequence.slot >= 0:
            self._faults.for_nobody("prefix", lambda: self._leave(sequence))
        self._faults.for_nobody("free", lambda: self.scheduler.remove(sequence))
        self._faults.for_nobody("report", lambda: self._report.finish(sequence, reason, report))

    def _leave(self, sequence: Sequence) -> None:
        """Caches what a sequence that ends has computed."""
        slot, progress, observed = sequence.slot, sequence.progress, self.kv.observed.get(sequence.slot)
        left = replace(
            self.kv.contents(slot, progress.computed),
            evictions=progress.evictions,
            evicted_at=progress.evicted_at,
            shareable=progress.shareable,
            protect=sequence.plan.protect,
            repeated=progress.repeated,
            observed=observed if observed is not None and observed.needs.all_queries else None,
        )
        tokens = sequence.tokens(0, progress.computed)
        self._reuse.after_end(slot, sequence.keys, tokens, left, sequence.plan.policy.name)

    def _end_step(self, schedule: Schedule, started: float) -> list[Output]:
        """Hands out what is new, and learns how long it took."""
        report, self._report = self._report, StepReport()
        report.evictions, self._evictions.told = self._evictions.told, []
        self._faults.for_nobody("prefix", self._reuse.write_some)
        seconds = time.perf_counter() - started
        self._faults.for_nobody("report", lambda: self._tell(report, schedule, seconds))
        self._faults.end_step(schedule.sequences)
        return report.outputs

    def _tell(self, report: StepReport, schedule: Schedule, seconds: float) -> None:
        self.last_stats = report.bare_stats(self.scheduler, seconds)  # lest those before are told again
        self.last_stats = stats = report.stats(self.kv, self._reuse, self.scheduler, schedule, seconds)
        decodes = sum(schedule.chunks) - stats.prompt_tokens
        sampled = stats.generation_tokens > 0
        self.scheduler.pace.observe(decodes, stats.prompt_tokens, seconds, sampled)
