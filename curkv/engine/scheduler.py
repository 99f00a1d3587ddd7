"""Which sequences run in the next step, and with how many tokens each."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

from curkv.cache.footprint import footprint
from curkv.cache.page_manager import PageManager
from curkv.cache.prefixes import Prefix
from curkv.cache.reuse import PrefixReuse
from curkv.engine.pace import Pace
from curkv.engine.sequence import Sequence

MAX_JUDGED_TOKENS = 64
"""Tokens of a prompt that a step judges while others decode: their logits cost more than their layers."""


@dataclass
class Schedule:
    """One step's work.

    Attributes:
        sequences: those that run, single tokens first.
        chunks: how many new tokens each has.
        wanted: of how many last tokens of each chunk logits are wanted.
        last_rows: row of the logits that each sequence samples from; None if more of its tokens are known.
        preempted: sequences that had to make room.
        admitted: sequences that ran for the first time.
    """

    sequences: list[Sequence] = field(default_factory=list)
    chunks: list[int] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)
    last_rows: list[int | None] = field(default_factory=list)
    preempted: int = 0
    admitted: list[Sequence] = field(default_factory=list)

    def only(self, indices: list[int]) -> Schedule:
        """The same step for some of its sequences."""
        sequences, chunks = [self.sequences[i] for i in indices], [self.chunks[i] for i in indices]
        step = Schedule(sequences, chunks, preempted=self.preempted, admitted=self.admitted)
        step.count_logits()
        return step

    def count_logits(self) -> None:
        """Settles which logits are wanted: of a whole chunk to judge a prompt, else of the last token."""
        row = -1
        for sequence, chunk in zip(self.sequences, self.chunks, strict=True):
            last = chunk == sequence.remaining
            one = last or sequence.drafts_behind(chunk)
            self.wanted.append(chunk if sequence.wants_prompt_logprobs else int(one))
            row += self.wanted[-1]
            self.last_rows.append(row if last else None)


class Scheduler:
    """Continuous batching: running decodes first, then prefills in order, then new sequences that fit.

    A sequence is admitted when its whole prompt fits beside what the running ones hold, what prefills in
    flight still need, and what decodes will append while the prompt is computed. What a sequence will hold
    later is what eviction leaves of it, so nothing is reserved for its prompt plus `max_tokens`. If pages run
    out all the same, the newest sequence is preempted and computed again later.

    A new sequence starts from the longest cached prefix of its prompt. While a running one computes the
    compressed context that it could start from, it waits, and others may overtake it.

    Args:
        kv: the cache.
        reuse: finds the cached prefixes of prompts.
        max_step_tokens: most tokens of one step.
        max_itl: seconds that a step with running decodes may take, see `Pace`.
    """

    def __init__(
        self, kv: PageManager, reuse: PrefixReuse, max_step_tokens: int, max_itl: float | None = None
    ):
        self.kv = kv
        self._reuse = reuse
        self.max_step_tokens = max_step_tokens
        self.pace = Pace(max_itl, max_step_tokens)
        self.running: list[Sequence] = []
        self._waiting: list[tuple[tuple[int, int], Sequence]] = []
        self._admitted: list[Sequence] = []

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
        bisect.insort(self._waiting, (sequence.priority, sequence))

    def find(self, request_id: str) -> list[Sequence]:
        """All unfinished sequences of a request."""
        waiting = (sequence for _, sequence in self._waiting)
        return [s for s in (*self.running, *waiting) if s.request.id == request_id]

    @property
    def candidates(self) -> list[Sequence]:
        """What the next step looks at: the running sequences, and the one that would be admitted first."""
        first = self._next_waiting()
        return [*self.running, *([first] if first is not None else [])]

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and gives its pages back, as the last thing."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self._waiting = [entry for entry in self._waiting if entry[1] is not sequence]
        slot, sequence.slot = sequence.slot, -1
        self._free(slot)

    def adopt(self, sequence: Sequence) -> None:
        """Lets a sequence run that already holds memory (a fork)."""
        self.running.append(sequence)

    def schedule(self, alone: Sequence | None = None) -> Schedule:
        """Picks the next step's work, for which there are pages.

        Whatever raises, every sequence runs or waits afterwards, and can be scheduled again.

        Args:
            alone: a step for this sequence and no other; None: for all.
        """
        step = Schedule()
        budget = self.step_tokens()
        running = self.running if alone is None else [s for s in self.running if s is alone]
        for sequence in sorted(running, key=lambda s: (s.remaining > 1, s.priority)):
            budget -= self._plan_chunk(step, sequence, budget)
        self._preempt_until_it_fits(step)
        while budget > 1 and not step.preempted:
            candidate = self._next_waiting() if alone is None else alone
            if candidate in self.running or candidate is None or not self._admit(candidate):
                break
            budget -= self._plan_chunk(step, candidate, budget)
        decodes_first = sorted(range(len(step.chunks)), key=lambda i: step.chunks[i] > 1)
        step.sequences = [step.sequences[i] for i in decodes_first]
        step.chunks = [step.chunks[i] for i in decodes_first]
        step.admitted, self._admitted = self._admitted, []
        step.count_logits()
        return step

    def step_tokens(self) -> int:
        """Most tokens of the next step."""
        return self.pace.tokens(sum(not sequence.prefilling for sequence in self.running))

    def _plan_chunk(self, step: Schedule, sequence: Sequence, budget: int) -> int:
        """Adds what a step's budget allows; of several tokens none is left alone, which would be a decode."""
        left = min(sequence.remaining, sequence.next_stop() - sequence.computed)
        judged = sequence.wants_prompt_logprobs and any(not other.prefilling for other in self.running)
        chunk = min(budget, left, MAX_JUDGED_TOKENS if judged else left)
        if left - chunk == 1:
            chunk -= 1
        if chunk > 1 or chunk == left == 1:
            step.sequences.append(sequence)
            step.chunks.append(chunk)
            return chunk
        return 0

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
        slot = sequence.slot
        self.running.remove(sequence)
        sequence.reset()
        self.add(sequence)
        self._free(slot)

    def restart(self) -> None:
        """Has all running sequences computed again later; what they hold is left to whoever cleans up."""
        running, self.running = self.running, []
        for sequence in running:
            sequence.reset()
            self.add(sequence)

    def _admit(self, sequence: Sequence) -> bool:
        """Moves a waiting sequence to the running ones if it fits."""
        if len(self.running) >= self.kv.layout.max_sequences:
            return False
        if sequence.read:
            self._reuse.restore(sequence.keys, sequence.prompt, sequence.read)
            sequence.read = ()
        prefix = self._reuse.find(sequence.keys, sequence.prompt, sequence.computes_all)
        if self.running and not self._fits(sequence, prefix):
            return False
        slot, prefix = self._reuse.start(prefix, sequence.observed)
        if sequence.first_run is None:
            self._admitted.append(sequence)
        self._waiting.remove((sequence.priority, sequence))
        self.running.append(sequence)
        sequence.start(slot, prefix)
        return True

    def _next_waiting(self) -> Sequence | None:
        """The first sequence in the queue whose context is not being compressed by a running one."""
        compressing = {s.keys.context for s in self.running if s.compressing} - {None}
        return next((s for _, s in self._waiting if s.keys.context not in compressing), None)

    def _fits(self, sequence: Sequence, prefix: Prefix | None) -> bool:
        """Whether a new sequence can be prefilled beside the running ones without preempting any."""
        prefills = [s for s in self.running if s.prefilling]
        decodes = [s for s in self.running if not s.prefilling]
        computed = prefix.tokens if prefix is not None else 0
        prompt_left = len(sequence.prompt) - computed + sum(s.remaining for s in prefills)
        steps = -(-prompt_left // self.step_tokens())
        needed = footprint(self.kv, sequence.plan, len(sequence.output), prefix)
        needed += self._pages_needed(prefills, [self._growth(s) for s in prefills])
        needed += self._pages_needed(decodes, [max(s.remaining, steps) for s in decodes])
        return needed <= self.kv.free_pages

    def _growth(self, sequence: Sequence) -> int:
        """Tokens per head that a prefill will add at most to what it holds."""
        growth = max(0, sequence.plan.peak_prompt_tokens - int(self.kv.held_tokens(sequence.slot)))
        return growth if sequence.plan.computes_behind else min(sequence.remaining, growth)

    def _pages_needed(self, sequences: list[Sequence], chunks: list[int]) -> int:
        return self.kv.pages_needed([s.slot for s in sequences], chunks) if sequences else 0

    def _free(self, slot: int) -> None:
        if slot >= 0:
            self.kv.free(slot)
