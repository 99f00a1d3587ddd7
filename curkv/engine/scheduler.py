"""Which sequences run in the next step, and with how many tokens each."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from curkv.cache.kv_cache import KVCache
from curkv.engine.pace import Pace
from curkv.engine.sequence import Sequence


@dataclass
class Schedule:
    """One step's work: `chunks[i]` new tokens of `sequences[i]`, single tokens first."""

    sequences: list[Sequence] = field(default_factory=list)
    chunks: list[int] = field(default_factory=list)
    preempted: int = 0


class Scheduler:
    """Continuous batching: running decodes first, then prefills in order, then new sequences that fit.

    A sequence is admitted when its whole prompt fits beside what the running ones hold, what prefills in
    flight still need, and what decodes will append while the prompt is computed. What a sequence will hold
    later is what eviction leaves of it, so nothing is reserved for its prompt plus `max_tokens`. If pages run
    out all the same, the newest sequence is preempted and computed again later.

    Args:
        kv: the cache.
        max_step_tokens: most tokens of one step.
        max_itl: seconds that a step with running decodes may take, see `Pace`.
    """

    def __init__(self, kv: KVCache, max_step_tokens: int, max_itl: float | None = None):
        self.kv = kv
        self.max_step_tokens = max_step_tokens
        self.pace = Pace(max_itl, max_step_tokens)
        self.running: list[Sequence] = []
        self._waiting: list[tuple[tuple[int, int], Sequence]] = []

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue."""
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        """Whether any sequence runs or waits."""
        return bool(self.running or self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence by priority, then order of arrival."""
        heapq.heappush(self._waiting, (sequence.priority, sequence))

    def find(self, request_id: str) -> list[Sequence]:
        """All unfinished sequences of a request."""
        waiting = (sequence for _, sequence in self._waiting)
        return [s for s in (*self.running, *waiting) if s.request.id == request_id]

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and gives its pages back."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self._waiting = [entry for entry in self._waiting if entry[1] is not sequence]
            heapq.heapify(self._waiting)
        self._free(sequence)

    def adopt(self, sequence: Sequence) -> None:
        """Lets a sequence run that already holds memory (a fork)."""
        self.running.append(sequence)

    def schedule(self) -> Schedule:
        """Picks the next step's work and takes its pages; lengths are advanced by the step's tokens."""
        step = Schedule()
        budget = self._step_tokens()
        for sequence in sorted(self.running, key=lambda s: (s.remaining > 1, s.priority)):
            budget -= self._plan_chunk(step, sequence, budget)
        self._preempt_until_it_fits(step)
        while budget > 0 and not step.preempted and self._admit_next():
            budget -= self._plan_chunk(step, self.running[-1], budget)
        decodes_first = sorted(range(len(step.chunks)), key=lambda i: step.chunks[i] > 1)
        step.sequences = [step.sequences[i] for i in decodes_first]
        step.chunks = [step.chunks[i] for i in decodes_first]
        if step.sequences:
            self.kv.extend([s.slot for s in step.sequences], step.chunks)
        return step

    def _step_tokens(self) -> int:
        return self.pace.tokens(sum(not sequence.prefilling for sequence in self.running))

    def _plan_chunk(self, step: Schedule, sequence: Sequence, budget: int) -> int:
        chunk = min(budget, sequence.remaining, sequence.next_stop() - sequence.computed)
        if chunk > 0:
            step.sequences.append(sequence)
            step.chunks.append(chunk)
        return chunk

    def _preempt_until_it_fits(self, step: Schedule) -> None:
        while step.sequences and self._pages_needed(step.sequences, step.chunks) > self.kv.free_pages:
            if len(self.running) == 1:
                raise RuntimeError("a single sequence does not fit the page pool; admission should refuse it")
            victim = max(self.running, key=lambda s: s.priority)
            if victim in step.sequences:
                position = step.sequences.index(victim)
                del step.sequences[position], step.chunks[position]
            self.preempt(victim)
            step.preempted += 1

    def preempt(self, sequence: Sequence) -> None:
        """Takes a sequence's pages; it is computed again later, from its place in the queue."""
        self.running.remove(sequence)
        self._free(sequence)
        sequence.reset()
        self.add(sequence)

    def _admit_next(self) -> bool:
        """Moves the first waiting sequence to the running ones if it fits."""
        if not self._waiting or len(self.running) >= self.kv.layout.max_sequences:
            return False
        sequence = self._waiting[0][1]
        if self.running and not self._fits(sequence):
            return False
        heapq.heappop(self._waiting)
        sequence.slot = self.kv.add_sequence(sequence.observed)
        sequence.mark_scheduled()
        self.running.append(sequence)
        return True

    def _fits(self, sequence: Sequence) -> bool:
        """Whether a new sequence can be prefilled beside the running ones without preempting any."""
        prefills = [s for s in self.running if s.prefilling]
        decodes = [s for s in self.running if not s.prefilling]
        prompt_left = len(sequence.prompt) + sum(s.remaining for s in prefills)
        steps = -(-prompt_left // self._step_tokens())
        plan = sequence.plan
        peak = max(plan.peak_prompt_tokens, plan.kept_prompt_tokens + len(sequence.output))
        needed = self.kv.layout.sequence_pages(peak)
        needed += self._pages_needed(prefills, [self._growth(s) for s in prefills])
        needed += self._pages_needed(decodes, [max(s.remaining, steps) for s in decodes])
        return needed <= self.kv.free_pages

    def _growth(self, sequence: Sequence) -> int:
        """Tokens per head that a prefill will add at most to what it holds."""
        held = self.kv.sequence_tokens(sequence.slot) // self.kv.layout.num_heads
        return min(sequence.remaining, max(0, sequence.plan.peak_prompt_tokens - held))

    def _pages_needed(self, sequences: list[Sequence], chunks: list[int]) -> int:
        return self.kv.pages_needed([s.slot for s in sequences], chunks) if sequences else 0

    def _free(self, sequence: Sequence) -> None:
        if sequence.slot >= 0:
            self.kv.free(sequence.slot)
            sequence.slot = -1
