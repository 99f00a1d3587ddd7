"""Whose fault a raised exception is, and when the engine is given up."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

import torch

from curkv.engine.types import EngineFault, Phase
from curkv.ranks import RankLost

if TYPE_CHECKING:
    from curkv.engine.sequence import Sequence

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

MAX_FAILED_STEPS = 8
"""Steps in a row of which nothing came, before it is asked whether the engine still works."""


class EngineBroken(RuntimeError):
    """The engine can do nothing more; a new process may."""


class Faults:
    """The faults of a step, who pays for them, and how many steps in a row have failed.

    Of several processes that run one model, others may have gone on where one has failed: then the first
    fault is the last.

    Attributes:
        phase: what is being done.
        noted: faults of the running step.
        unexplained: one of them was nobody's: it did not come back with any sequence alone.
    """

    def __init__(
        self,
        again: Callable[[Sequence], None],
        end: Callable[[Sequence, EngineFault], None],
        alone: bool = True,
    ) -> None:
        """Has seen none.

        Args:
            again: has a sequence computed anew.
            end: ends a sequence for a fault.
            alone: no other process runs the same model.
        """
        self._again, self._end, self._alone = again, end, alone
        self.phase: Phase = "schedule"
        self.noted = 0
        self.unexplained = False
        self._blamed: list[Sequence] = []
        self._failed_steps = 0
        self._own = False

    def for_one(
        self, sequence: Sequence, phase: Phase, act: Callable[Concatenate[Sequence, P], T | None],
        *args: P.args, **named: P.kwargs,
    ) -> T | None:  # fmt: skip
        """Does something for a sequence that holds memory, which is blamed if it raises."""
        self.phase = phase
        if sequence.slot >= 0:
            try:
                return act(sequence, *args, **named)
            except Exception as error:
                self.blame(sequence, error)
        return None

    def for_nobody(self, phase: Phase, act: Callable[[], None]) -> None:
        """Does what no sequence is to suffer for if it raises."""
        try:
            act()
        except Exception as error:
            self.note(error, phase=phase)
            self.unexplained = True

    def blame(self, sequence: Sequence, error: Exception, again: bool = True) -> None:
        """Deals with a sequence over which a phase has raised.

        Args:
            sequence: the sequence.
            error: what was raised.
            again: it may be computed anew once.
        """
        self.note(error, sequence)
        if again and not sequence.faulty and sequence.slot >= 0:
            sequence.faulty = True
            self.for_nobody("free", lambda: self._again(sequence))
            return
        fault = EngineFault(self.phase)
        fault.__cause__ = error
        self._end(sequence, fault)

    def note(self, error: Exception, sequence: Sequence | None = None, phase: Phase | None = None) -> None:
        """Takes note of something that was raised.

        Args:
            error: what was raised.
            sequence: at whose turn; None: while several were worked on, or none.
            phase: while what was done; None: what is being done.

        Raises:
            EngineBroken: the device is lost, and with it everything in its memory, or other processes have
                to do the same as this one.
        """
        phase = phase or self.phase
        self.noted += 1
        if sequence is not None:
            self._blamed.append(sequence)
        if isinstance(error, RankLost):
            raise EngineBroken(str(error)) from error
        logger.error("%s failed", phase, exc_info=error)
        if is_device_lost(error):
            raise EngineBroken(f"the device failed: {error}") from error
        if not self._alone:
            raise EngineBroken(f"{phase} failed, which other processes need not have noticed") from error

    def end_step(self, sequences: list[Sequence]) -> None:
        """Counts a step.

        Args:
            sequences: whose tokens were computed in it.
        """
        succeeded = any(sequence not in self._blamed for sequence in sequences)
        if self.unexplained or (self.noted and not succeeded):
            self._failed_steps += 1
            self._own |= self.unexplained
        elif succeeded:
            self._failed_steps, self._own = 0, False
        self.noted, self.unexplained, self._blamed = 0, False, []

    def check(self, works: Callable[[], bool]) -> None:
        """Checks that the engine can go on.

        Args:
            works: tries whether a request that is certainly good would be served; asked if each of many
                failed steps was some request's fault.

        Raises:
            EngineBroken: too many steps in a row have failed, and not for what was asked.
        """
        if self._failed_steps < MAX_FAILED_STEPS:
            return
        if self._own or not works():
            raise EngineBroken(f"{self._failed_steps} steps in a row have failed")
        self._failed_steps = 0


def is_device_lost(error: Exception) -> bool:
    """Whether an error of a GPU is one that every later call would meet too; lack of memory is not."""
    lost = isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)
    return lost and not isinstance(error, torch.OutOfMemoryError)
