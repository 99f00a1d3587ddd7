"""What running sequences drop: when it is due, what has to be computed for it before, and the move itself."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from curkv.cache.eviction import Eviction, evict, select
from curkv.cache.page_pool import OutOfPages
from curkv.cache.plan import EvictionPlan
from curkv.engine.draft import look_ahead
from curkv.engine.repetition import Repetition
from curkv.engine.stats import EvictionStats

if TYPE_CHECKING:
    from curkv.cache.reuse import PrefixReuse
    from curkv.engine.faults import Faults
    from curkv.engine.runner import Runner
    from curkv.engine.scheduler import Scheduler
    from curkv.engine.sequence import Sequence
    from curkv.models.info import ModelInfo

EvictionPhase = Literal["prefill", "decode"]


@dataclass(frozen=True)
class _Chosen:
    """What a sequence is to keep.

    Attributes:
        sequence: whose tokens these are.
        phase: when it is evicted.
        held: tokens held before, per head on average.
        eviction: what is kept.
    """

    sequence: Sequence
    phase: EvictionPhase
    held: float
    eviction: Eviction


class Evictions:
    """Evicts from sequences as their plans say.

    Args:
        runner: the model over its cache.
        info: its tokenizer, to have texts repeated.
        scheduler: runs the sequences, and has those computed anew for which there is no room.
        reuse: caches compressed contexts.
        faults: who pays for what is raised.

    Attributes:
        told: the evictions that nobody has taken note of yet.
    """

    def __init__(
        self, runner: Runner, info: ModelInfo, scheduler: Scheduler, reuse: PrefixReuse, faults: Faults
    ) -> None:
        self._runner, self._kv, self._info = runner, runner.kv, info
        self._scheduler, self._reuse, self._faults = scheduler, reuse, faults
        self.told: list[EvictionStats] = []

    def evict_due(self, sequences: Iterable[Sequence]) -> None:
        """Evicts from those that are due after a step, or begins to repeat their texts before."""
        due: list[tuple[Sequence, EvictionPhase]] = []
        for sequence in sequences:
            phase: EvictionPhase | None = self._faults.for_one(sequence, "evict", self._due)
            if phase is not None:
                due.append((sequence, phase))
        self._evict(due)

    def repeat_next(self) -> None:
        """Repeats a piece of one text, and evicts that in the end: one per step, so that decodes go on."""
        self._faults.phase = "evict"
        sequence = next((s for s in self._scheduler.running if s.repeating), None)
        if sequence is None:
            return
        progress, slot = sequence.progress, sequence.slot
        assert progress.repetition is not None
        try:
            most = self._scheduler.step_tokens()
            progress.repeated_tokens += progress.repetition.advance(self._runner, slot, most)
            sequence.peak_bytes = max(sequence.peak_bytes, self._kv.sequence_bytes(slot))
            if progress.repetition.done and not sequence.explain_plans:
                self._evict([(sequence, "prefill")])
                self.hold_compressed(sequence)
        except OutOfPages:
            self._scheduler.preempt(sequence)
        except Exception as error:
            self._faults.blame(sequence, error)

    def repeat(self, sequence: Sequence) -> None:
        """Has the model repeat what is computed of a sequence, from the next step on."""
        progress = sequence.progress
        text, room = sequence.prompt[: progress.computed], self._kv.layout.max_tokens - progress.computed
        progress.repetition = Repetition(text, self._info, room, progress.evicted_at, progress.repeated)

    def draft(self, sequence: Sequence, plan: EvictionPlan) -> Tensor | None:
        """What a drafted answer looks at, if a plan is to know and the prompt is just computed.

        Raises:
            OutOfPages: there is no room for it.
        """
        progress, count = sequence.progress, plan.draft_tokens
        if progress.following is None or progress.computed != len(sequence.prompt) or not count:
            return None
        progress.repeated_tokens += count
        return look_ahead(self._runner, sequence.slot, progress.following, progress.computed, count)

    def hold_compressed(self, sequence: Sequence) -> None:
        """Caches a context that is compressed now, if it is what others would have."""
        progress = sequence.progress
        if progress.shareable and sequence.slot >= 0 and not sequence.repeating:
            evictions, repeated = progress.evictions, progress.repeated
            self._reuse.after_eviction(sequence.slot, sequence.keys, progress.computed, evictions, repeated)

    def _due(self, sequence: Sequence) -> EvictionPhase | None:
        """The eviction that is due now, if one is; a text that is to be repeated before is begun."""
        decoded, plan = sequence.computed - len(sequence.prompt), sequence.plan
        held = self._kv.held_tokens(sequence.slot)
        if decoded <= 0 and plan.prefill_due(sequence.computed, held):
            if not plan.needs.repetition:
                return "prefill"
            self.repeat(sequence)
        elif decoded > 0 and plan.decode_due(decoded, held):
            return "decode"
        return None

    def _evict(self, due: list[tuple[Sequence, EvictionPhase]]) -> None:
        """Evicts as plans say: each sequence's tokens are scored by themselves, and all are moved at once.

        Those whose evictions raised together with others' are evicted alone.
        """
        if not due:
            return
        self._kv.wait()  # the step is no part of what evictions take
        started = time.perf_counter()
        selected = [self._faults.for_one(sequence, "evict", self._select, phase) for sequence, phase in due]
        chosen = [one for one in selected if one is not None]
        together = [one for one in chosen if not one.sequence.evicted_alone]
        for some in (together, *([one] for one in chosen if one.sequence.evicted_alone)):
            if some:
                self._keep(some, started)
                started = time.perf_counter()

    def _select(self, sequence: Sequence, phase: EvictionPhase) -> _Chosen | None:
        """Scores a sequence's tokens and chooses some; a device is told to, and not waited for.

        Returns:
            What was chosen; None: there was no room for a draft, and the sequence starts anew.
        """
        slot, plan, progress = sequence.slot, sequence.plan, sequence.progress
        self._kv.trim([slot])
        try:
            draft = self.draft(sequence, plan)
        except OutOfPages:
            self._scheduler.preempt(sequence)
            return None
        repetition = progress.repetition.scores if progress.repetition is not None else None
        view = self._runner.attention.view(slot, plan.seed, phase, progress.evictions)
        view = replace(view, draft=draft, repetition=repetition)
        kept = select(view, plan, self._kv.kernels)
        return _Chosen(sequence, phase, self._kv.held_tokens(slot), Eviction(slot, view, plan, *kept))

    def _keep(self, chosen: list[_Chosen], started: float) -> None:
        """Keeps what was chosen; a sequence that shares pages which cannot be copied starts anew.

        What sequences hold that raised together may be half moved: all of them are computed anew.
        """
        [first, *others] = chosen
        try:
            freed = evict(self._kv, [one.eviction for one in chosen])
        except OutOfPages:
            if others:  # there may be room for one after the other
                for one in chosen:
                    self._keep([one], started)
                    started = time.perf_counter()
            else:
                self._scheduler.preempt(first.sequence)
            return
        except Exception as error:
            if others:
                self._faults.note(error)
                for one in chosen:
                    one.sequence.evicted_alone = True
                    self._scheduler.preempt(one.sequence)
            else:
                self._faults.blame(first.sequence, error)
            return
        seconds = (time.perf_counter() - started) / len(chosen)
        for one, pages in zip(chosen, freed, strict=True):
            self._faults.for_one(one.sequence, "evict", self._note, one, pages, seconds)

    def _note(self, sequence: Sequence, chosen: _Chosen, pages_freed: int, seconds: float) -> None:
        """Takes note of what a sequence has lost, and of what repeating its text paid to what is left."""
        progress, view, before = sequence.progress, chosen.eviction.view, chosen.held
        budgets = self._kv.head_lengths(sequence.slot)[list(self._kv.layout.evicted_rows)]
        if view.repetition is not None:
            own = view.own(chosen.eviction.indices)[..., : budgets.max()]
            paid = view.repetition.gather(2, own.clamp_min(0).long())
            progress.repeated, progress.repetition = paid.masked_fill_(own < 0, -torch.inf), None
        kept = float(budgets.mean())
        progress.evictions += 1
        progress.evicted_at = progress.computed
        progress.decode_evictions += chosen.phase == "decode"
        progress.evicted_tokens += before - kept
        self.told.append(
            EvictionStats(
                policy=sequence.plan.policy.name,
                phase=chosen.phase,
                tokens_evicted=round((before - kept) * budgets.size),
                pages_freed=max(0, pages_freed),
                seconds=seconds,
                kept_ratio=kept / before,
                head_budgets=budgets,
            )
        )
